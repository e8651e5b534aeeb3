# Finds TensorRT's headers: TensorRT::Headers. Its library is loaded at run time, and not looked for.
#
# TENSORRT_ROOT says where: an unpacked release of TensorRT or of TensorRT for RTX, or /usr where
# JetPack or a Debian package put them. TensorRT's headers include CUDA's, which CUDA_HOME or
# CUDAToolkit_ROOT may name.

set(tensorrt_root ${TENSORRT_ROOT})
if(NOT tensorrt_root)
  set(tensorrt_root $ENV{TENSORRT_ROOT})
endif()
# A root named later, or another one, is to count.
if(NOT "${tensorrt_root}" STREQUAL "${TensorRT_SEARCHED_ROOT}")
  unset(TensorRT_INCLUDE_DIR CACHE)
endif()
set(TensorRT_SEARCHED_ROOT "${tensorrt_root}" CACHE INTERNAL "")
set(tensorrt_where)
if(tensorrt_root)
  set(tensorrt_where PATHS ${tensorrt_root} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
endif()
find_path(TensorRT_INCLUDE_DIR NvInfer.h ${tensorrt_where}
          PATH_SUFFIXES include include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS ${CUDAToolkit_ROOT} $ENV{CUDAToolkit_ROOT} ${CUDA_HOME} $ENV{CUDA_HOME}
                ${tensorrt_root}
          PATHS /usr/local/cuda
          PATH_SUFFIXES include targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include)

if(TensorRT_INCLUDE_DIR)
  file(STRINGS ${TensorRT_INCLUDE_DIR}/NvInferVersion.h version_lines
       REGEX "^#define [A-Z_]+ [0-9]+")
  foreach(part MAJOR MINOR PATCH)
    # Newer headers, and those of TensorRT for RTX, have names with another ending.
    if("${version_lines}" MATCHES "(NV_TENSORRT|TRT)_${part}(_ENTERPRISE|_RTX)? ([0-9]+)")
      list(APPEND version_parts ${CMAKE_MATCH_3})
    endif()
  endforeach()
  string(REPLACE ";" "." TensorRT_VERSION "${version_parts}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
  REQUIRED_VARS TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR
  VERSION_VAR TensorRT_VERSION
  REASON_FAILURE_MESSAGE
    "set TENSORRT_ROOT to a folder with include/NvInfer.h, and CUDA_HOME to CUDA's")
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR)

if(TensorRT_FOUND AND NOT TARGET TensorRT::Headers)
  add_library(TensorRT::Headers INTERFACE IMPORTED)
  target_include_directories(TensorRT::Headers SYSTEM INTERFACE ${TensorRT_INCLUDE_DIR}
                                                                ${TensorRT_CUDA_INCLUDE_DIR})
endif()
