# Defines ikem::torch (headers and libraries of torch's host part), ikem::pybind11 and IKEM_FAST_TORCH_{VERSION,CUDA}.
#
# torch's own TorchConfig.cmake is not used: with a CUDA torch it demands a whole CUDA toolkit, which somebody who
# installs the default wheel need not have, and it caches paths that are gone after an isolated build.
if(NOT IKEM_FAST_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin), end='')"
    OUTPUT_VARIABLE IKEM_FAST_TORCH_ROOT
    RESULT_VARIABLE torch_missing
    ERROR_QUIET)
  if(torch_missing)
    message(FATAL_ERROR "ikem_fast: ${Python_EXECUTABLE} has no torch to build against")
  endif()
endif()

file(STRINGS "${IKEM_FAST_TORCH_ROOT}/version.py" torch_version_lines REGEX "^(__version__|cuda)")
foreach(line IN LISTS torch_version_lines)
  if(line MATCHES "^__version__ *= *['\"]([^'\"]+)['\"]")
    set(IKEM_FAST_TORCH_VERSION "${CMAKE_MATCH_1}")
  elseif(line MATCHES "^cuda[^=]*= *['\"]([0-9.]+)['\"]")
    set(IKEM_FAST_TORCH_CUDA "${CMAKE_MATCH_1}")
  endif()
endforeach()

add_library(ikem_torch INTERFACE)
add_library(ikem::torch ALIAS ikem_torch)
target_include_directories(ikem_torch SYSTEM INTERFACE
  "${IKEM_FAST_TORCH_ROOT}/include" "${IKEM_FAST_TORCH_ROOT}/include/torch/csrc/api/include")
target_link_libraries(ikem_torch INTERFACE
  -Wl,--no-as-needed
  "${IKEM_FAST_TORCH_ROOT}/lib/libtorch.so"
  "${IKEM_FAST_TORCH_ROOT}/lib/libtorch_cpu.so"
  "${IKEM_FAST_TORCH_ROOT}/lib/libc10.so"
  -Wl,--as-needed)

# The pybind11 headers that torch ships: those of an isolated build would change their path, and with it every
# object, on each `pip install .`.
add_library(ikem_pybind11 INTERFACE)
add_library(ikem::pybind11 ALIAS ikem_pybind11)
target_include_directories(ikem_pybind11 SYSTEM INTERFACE "${IKEM_FAST_TORCH_ROOT}/include")
