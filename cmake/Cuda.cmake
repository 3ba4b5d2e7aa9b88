# Decides whether the CUDA part is built and enables the language: sets IKEM_FAST_BUILD_CUDA and
# IKEM_FAST_CUDA_ARCHITECTURES.
#   auto  built when torch has CUDA and nvcc is there
#   on    built against any torch (compiles without a GPU and under a CPU torch); no nvcc is an error
#   off   not built
set(IKEM_FAST_CUDA "auto" CACHE STRING "auto, on or off")
set(IKEM_FAST_CUDA_ARCHITECTURES "" CACHE STRING "CMake architectures; empty for the default")
string(TOLOWER "${IKEM_FAST_CUDA}" cuda_choice)
if(NOT cuda_choice MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "IKEM_FAST_CUDA must be auto, on or off, got '${IKEM_FAST_CUDA}'")
endif()
if(NOT IKEM_FAST_CUDA_ARCHITECTURES)
  set(IKEM_FAST_CUDA_ARCHITECTURES "80-real;90a-real;100-real")
endif()

set(IKEM_FAST_BUILD_CUDA OFF)
if(cuda_choice STREQUAL "on" OR (cuda_choice STREQUAL "auto" AND IKEM_FAST_TORCH_CUDA))
  if(NOT CMAKE_CUDA_COMPILER)
    if(DEFINED ENV{CUDACXX})
      set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
    else()
      find_program(IKEM_FAST_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin)
      if(IKEM_FAST_NVCC)
        set(CMAKE_CUDA_COMPILER "${IKEM_FAST_NVCC}")
      endif()
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${IKEM_FAST_CUDA_ARCHITECTURES})
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    set(IKEM_FAST_BUILD_CUDA ON)
  elseif(cuda_choice STREQUAL "on")
    message(FATAL_ERROR "IKEM_FAST_CUDA=on, but there is no nvcc: put it on PATH or set CUDA_HOME")
  else()
    message(WARNING
      "torch has CUDA ${IKEM_FAST_TORCH_CUDA}, but there is no nvcc: the CUDA part of ikem_fast is left out")
  endif()
endif()
