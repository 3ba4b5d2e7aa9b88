#include "skeleton_parser.h"

#include <fcntl.h>
#include <locale.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>

namespace ikem_fast {
namespace {

constexpr int kBodyFields = 10;
constexpr int kJointFields = 12;
// 300 frames of six bodies take about 10 MB; what is larger by far is some other file.
constexpr std::int64_t kMaxFileBytes = std::int64_t{256} << 20;

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }

std::string quoted(std::string_view word) {
    constexpr std::size_t kShown = 40;
    constexpr char kHex[] = "0123456789abcdef";
    std::string text = "'";
    for (const char c : word.substr(0, kShown)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f) {
            text += c;
        } else {
            text += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
        }
    }
    return text + (word.size() > kShown ? "...'" : "'");
}

// Walks the text line by line and every line word by word.
class Lines {
public:
    explicit Lines(std::string_view text) : next_(text.data()), end_(text.data() + text.size()) {}

    std::size_t number() const { return number_; }
    std::size_t bytes_left() const { return static_cast<std::size_t>(end_ - next_); }

    bool advance() {
        if (next_ == end_) return false;
        const void* newline = std::memchr(next_, '\n', bytes_left());
        word_ = next_;
        line_end_ = newline != nullptr ? static_cast<const char*>(newline) : end_;
        next_ = newline != nullptr ? line_end_ + 1 : end_;
        ++number_;
        return true;
    }

    // The next word of the line; empty at its end.
    std::string_view word() {
        while (word_ != line_end_ && is_blank(*word_)) ++word_;
        const char* const begin = word_;
        while (word_ != line_end_ && !is_blank(*word_)) ++word_;
        return {begin, static_cast<std::size_t>(word_ - begin)};
    }

private:
    const char* next_;
    const char* end_;
    const char* word_ = nullptr;
    const char* line_end_ = nullptr;
    std::size_t number_ = 0;
};

// The value of a word that is a number in full, not-a-number and infinities included.
std::optional<double> to_number(std::string_view word) {
    const std::string_view digits = word.starts_with('+') ? word.substr(1) : word;
    if (digits.starts_with('-') && digits.size() != word.size()) return std::nullopt;
    double value = 0;
    const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (stop != digits.data() + digits.size() || error == std::errc::invalid_argument) return std::nullopt;
    // from_chars does not say whether the number is too large or too small; strtod gives infinity or (nearly) zero, and
    // with a locale of its own does not stop at the point where the process's has a comma.
    if (error == std::errc::result_out_of_range) {
        static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);
        return strtod_l(std::string(digits).c_str(), nullptr, plain);
    }
    return value;
}

// Whether to_number would give a value: told by the looks of words like -12.345, which are nearly all, at a fifth of the
// time that their value takes.
bool is_number(std::string_view word) {
    const auto is_digit = [](char c) { return static_cast<unsigned char>(c - '0') < 10; };
    const char* const end = word.data() + word.size();
    const char* const first = word.data() + word.starts_with('-');
    const char* const point = std::find_if_not(first, end, is_digit);
    if (point != first && (point == end || (*point == '.' && std::all_of(point + 1, end, is_digit)))) return true;
    return to_number(word).has_value();
}

class Parser {
public:
    Parser(std::string_view text, const SkeletonLimits& limits) : lines_(text), limits_(limits) {}

    Skeleton parse() {
        num_frames_ = read_count("frame count", "before the frame count");
        if (num_frames_ < 1 || num_frames_ > limits_.max_frames) {
            fail("frame count must be 1 to " + std::to_string(limits_.max_frames) + ", got " +
                 std::to_string(num_frames_));
        }
        skeleton_.num_frames = static_cast<int>(num_frames_);
        skeleton_.xyz.resize(std::size_t{3} * skeleton_.num_frames * limits_.num_joints * limits_.max_bodies);
        for (frame_ = 0; frame_ < num_frames_; ++frame_) read_frame();
        while (lines_.advance()) {
            if (const std::string_view word = lines_.word(); !word.empty()) {
                fail("the file must end after its " + std::to_string(num_frames_) + " frames, got " + quoted(word));
            }
        }
        if (skeleton_.num_bodies == 0) {
            throw SkeletonError(0, "no body in any of the " + std::to_string(num_frames_) + " frames");
        }
        return std::move(skeleton_);
    }

private:
    [[noreturn]] void fail(const std::string& reason) const { throw SkeletonError(lines_.number(), reason); }

    void next_line(const char* before_what) {
        if (lines_.advance()) return;
        std::string reason = "the file ends ";
        reason += before_what;
        if (num_frames_ > 0) {
            reason += " in frame " + std::to_string(frame_ + 1) + " of " + std::to_string(num_frames_);
        }
        throw SkeletonError(lines_.number() + 1, reason);
    }

    std::int64_t read_count(const char* what, const char* before_what) {
        next_line(before_what);
        const std::string_view word = lines_.word();
        std::int64_t count = 0;
        const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), count);
        if (word.empty() || stop != word.data() + word.size() || error != std::errc()) {
            fail(std::string(what) + " must be a whole number, got " + quoted(word));
        }
        if (const std::string_view more = lines_.word(); !more.empty()) {
            fail(std::string(what) + " must stand alone on its line, got " + quoted(more) + " after it");
        }
        return count;
    }

    // Reads exactly num_fields numbers. Those from num_finite on are not used: projections to the colour and depth
    // images, orientations and tracking states, where a sensor may well write nan.
    void read_numbers(double* values, int num_fields, int num_finite, const char* what) {
        int num_words = 0;
        for (std::string_view word = lines_.word(); !word.empty(); word = lines_.word(), ++num_words) {
            if (num_words >= num_fields) continue;
            const bool is_used = num_words < num_finite;
            const std::optional<double> value = is_used ? to_number(word) : std::nullopt;
            if (is_used ? !value : !is_number(word)) {
                fail(std::string(what) + ": field " + std::to_string(num_words + 1) + " must be a number, got " +
                     quoted(word));
            }
            if (!is_used) continue;
            if (!std::isfinite(*value)) {
                fail(std::string(what) + ": coordinate " + "xyz"[num_words] + " must be finite, got " + quoted(word));
            }
            values[num_words] = *value;
        }
        if (num_words != num_fields) {
            fail(std::string(what) + " must have " + std::to_string(num_fields) + " fields, got " +
                 std::to_string(num_words));
        }
    }

    void read_frame() {
        const std::int64_t num_bodies = read_count("body count", "before the body count");
        // A joint line has at least 12 digits with a blank or line end after each, but for the file's last byte.
        const std::int64_t body_bytes = 2 * kJointFields * std::int64_t{limits_.num_joints};
        const auto bytes_left = static_cast<std::int64_t>(lines_.bytes_left()) + 1;
        if (num_bodies < 0) fail("body count must not be negative, got " + std::to_string(num_bodies));
        if (num_bodies > bytes_left / body_bytes) {
            fail("the file ends too early for a body count of " + std::to_string(num_bodies));
        }
        skeleton_.num_bodies = std::max(skeleton_.num_bodies, static_cast<int>(num_bodies));
        for (std::int64_t body = 0; body < num_bodies; ++body) read_body(body);
    }

    void read_body(std::int64_t body) {
        next_line("before a body");
        read_numbers(nullptr, kBodyFields, 0, "body line");
        const std::int64_t num_joints = read_count("joint count", "before a joint count");
        if (num_joints != limits_.num_joints) {
            fail("joint count must be " + std::to_string(limits_.num_joints) + ", got " + std::to_string(num_joints));
        }
        const std::size_t plane = std::size_t(num_frames_) * limits_.num_joints * limits_.max_bodies;
        for (std::int64_t joint = 0; joint < num_joints; ++joint) {
            double xyz[3];
            next_line("before a joint");
            read_numbers(xyz, kJointFields, 3, "joint line");
            if (body >= limits_.max_bodies) continue;
            double* const target =
                skeleton_.xyz.data() + (frame_ * limits_.num_joints + joint) * limits_.max_bodies + body;
            for (int axis = 0; axis < 3; ++axis) target[axis * plane] = xyz[axis];
        }
    }

    Lines lines_;
    SkeletonLimits limits_;
    Skeleton skeleton_;
    std::int64_t num_frames_ = 0;
    std::int64_t frame_ = 0;
};

class FileDescriptor {
public:
    explicit FileDescriptor(const char* path) : descriptor_(::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
    FileDescriptor(const FileDescriptor&) = delete;
    FileDescriptor& operator=(const FileDescriptor&) = delete;
    ~FileDescriptor() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }
    int get() const { return descriptor_; }

private:
    int descriptor_;
};

}  // namespace

Skeleton parse_skeleton(std::string_view text, const SkeletonLimits& limits) { return Parser(text, limits).parse(); }

std::string read_skeleton_file(const std::string& path) {
    const auto check = [](bool ok) {
        if (!ok) throw std::system_error(errno, std::generic_category());
    };
    const FileDescriptor file(path.c_str());
    check(file.get() >= 0);
    struct stat status {};
    check(::fstat(file.get(), &status) == 0);
    if (S_ISDIR(status.st_mode)) throw std::system_error(EISDIR, std::generic_category());
    if (!S_ISREG(status.st_mode)) throw SkeletonError(0, "is no regular file");
    if (status.st_size > kMaxFileBytes) {
        throw SkeletonError(0, "has " + std::to_string(status.st_size) + " bytes, more than any skeleton file");
    }
    // Read rather than mapped: a mapped file that another process cuts short would end this one with SIGBUS.
    std::string text(static_cast<std::size_t>(status.st_size), '\0');
    std::size_t filled = 0;
    while (filled < text.size()) {
        const ssize_t count = ::read(file.get(), text.data() + filled, text.size() - filled);
        if (count < 0 && errno == EINTR) continue;
        check(count >= 0);
        if (count == 0) break;
        filled += static_cast<std::size_t>(count);
    }
    text.resize(filled);
    return text;
}

}  // namespace ikem_fast

namespace {

namespace py = pybind11;

constexpr char kDoc[] = R"(Reads one NTU RGB+D .skeleton file; the GIL is released meanwhile.

Args:
    path: the file, with LF or CRLF line ends.
    num_joints: joints every body must have (V).
    max_bodies: bodies kept per frame, in file order (M).
    max_frames: a file with more frames is an error.

Returns:
    xyz: (3, F, V, M) float64 in metres, zero where a body is absent.
    num_frames: F.
    num_bodies_max: the largest number of bodies in one frame of the file.

Raises:
    ValueError: "PATH: line 17: ..." where the file is not what the format says.
    OSError: the file cannot be read.
)";

// Text that begins with a path: bytes that are no UTF-8 are decoded as Python decodes file names.
py::object file_system_text(const std::string& text) {
    return py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<py::ssize_t>(text.size())));
}

py::tuple parse_skeleton_file(const std::filesystem::path& path, int num_joints, int max_bodies, int max_frames) {
    const auto check_positive = [](const char* name, int value, int largest) {
        if (value >= 1 && value <= largest) return;
        throw py::value_error(std::string(name) + " must be 1 to " + std::to_string(largest) + ", got " +
                              std::to_string(value));
    };
    check_positive("num_joints", num_joints, 1024);
    check_positive("max_bodies", max_bodies, 64);
    check_positive("max_frames", max_frames, 1 << 16);

    ikem_fast::Skeleton skeleton;
    std::string error;
    int error_number = 0;
    {
        const py::gil_scoped_release without_gil;
        try {
            skeleton = ikem_fast::parse_skeleton(ikem_fast::read_skeleton_file(path.string()),
                                                 {num_joints, max_bodies, max_frames});
        } catch (const std::system_error& failure) {
            error_number = failure.code().value();
        } catch (const ikem_fast::SkeletonError& failure) {
            error = path.string() + ": " + failure.what();
        }
    }
    if (error_number != 0) {
        const py::object name = file_system_text(path.string());
        errno = error_number;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, name.ptr());
        throw py::error_already_set();
    }
    if (!error.empty()) {
        PyErr_SetObject(PyExc_ValueError, file_system_text(error).ptr());
        throw py::error_already_set();
    }
    auto values = std::make_unique<std::vector<double>>(std::move(skeleton.xyz));
    double* const data = values->data();
    const py::capsule owner(values.release(), [](void* pointer) { delete static_cast<std::vector<double>*>(pointer); });
    py::array_t<double> xyz({3, skeleton.num_frames, num_joints, max_bodies}, data, owner);
    return py::make_tuple(std::move(xyz), skeleton.num_frames, skeleton.num_bodies);
}

}  // namespace

void register_skeleton_parser(pybind11::module_& module) {
    module.def("parse_skeleton", &parse_skeleton_file, kDoc, py::arg("path"), py::arg("num_joints"),
               py::arg("max_bodies") = 2, py::arg("max_frames") = 300);
}
