// Parser of the NTU RGB+D ".skeleton" text format. Knows nothing of Python or torch, so that it runs without the GIL.
//
// The format: the number of frames; per frame the number of bodies; per body a line of 10 fields, a line with the
// number of joints, and per joint a line of 12 numbers of which the first three are x, y, z in metres.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ikem_fast {

struct SkeletonLimits {
    int num_joints;  // every body must have exactly as many
    int max_bodies;  // bodies kept per frame, in file order; those after them are checked and dropped
    int max_frames;  // a file with more is an error
};

struct Skeleton {
    std::vector<double> xyz;  // (3, num_frames, num_joints, max_bodies), zero where a body is absent
    int num_frames = 0;
    int num_bodies = 0;  // the largest number of bodies in one frame, also beyond max_bodies
};

// A file that is not what the format says; line is 1-based, 0 where the reason concerns the whole file.
class SkeletonError : public std::runtime_error {
public:
    SkeletonError(std::size_t line, const std::string& reason)
        : std::runtime_error(line == 0 ? reason : "line " + std::to_string(line) + ": " + reason) {}
};

// Allocates by max_frames at most, whatever the counts in the text claim. Throws SkeletonError.
Skeleton parse_skeleton(std::string_view text, const SkeletonLimits& limits);

// Throws std::system_error where the file cannot be read and SkeletonError where it is no regular file or too large.
std::string read_skeleton_file(const std::string& path);

}  // namespace ikem_fast
