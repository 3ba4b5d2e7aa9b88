// The Python module ikem_fast._C: helpers of the host side. Loading it also registers the operators.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "build_info.h"
#include "cpu/capability.h"

void register_skeleton_parser(pybind11::module_& module);  // csrc/host/skeleton_parser.cpp

namespace {

namespace py = pybind11;

// What _build_info.json beside the module says, and the instruction set that the CPU kernels use here.
py::dict build_info() {
    py::dict info = py::module_::import("json").attr("loads")(ikem_fast::kBuildInfoJson);
    info["cpu_capability"] = ikem_fast::cpu::capability_name(ikem_fast::cpu::capability());
    return info;
}

// How many threads at::parallel_for really runs on: each part waits a moment, so that no thread can take two.
int64_t count_parallel_threads() {
    std::mutex mutex;
    std::set<std::thread::id> threads;
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            threads.insert(std::this_thread::get_id());
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    return static_cast<int64_t>(threads.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled part of ikem_fast: host-side helpers; loading it registers the operators.";
    m.def("build_info", &build_info,
          "How this module was built (the content of _build_info.json) and cpu_capability, the instructions in use.");
    m.def("count_parallel_threads", &count_parallel_threads, py::call_guard<py::gil_scoped_release>(),
          "Number of threads that the CPU kernels really run on.");
    register_skeleton_parser(m);
}
