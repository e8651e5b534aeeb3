# Finds ONNX Runtime's C++ headers and library: OnnxRuntime::OnnxRuntime.
#
# ONNXRUNTIME_ROOT says where: an unpacked release of ONNX Runtime, and then nothing is taken from
# anywhere else. Without it, CMAKE_PREFIX_PATH and the system's folders are searched. Headers may
# lie in include, include/onnxruntime or include/onnxruntime/core/session.

set(onnxruntime_root ${ONNXRUNTIME_ROOT})
if(NOT onnxruntime_root)
  set(onnxruntime_root $ENV{ONNXRUNTIME_ROOT})
endif()
# A root named later, or another one, is to count.
if(NOT "${onnxruntime_root}" STREQUAL "${OnnxRuntime_SEARCHED_ROOT}")
  unset(OnnxRuntime_INCLUDE_DIR CACHE)
  unset(OnnxRuntime_LIBRARY CACHE)
endif()
set(OnnxRuntime_SEARCHED_ROOT "${onnxruntime_root}" CACHE INTERNAL "")
set(onnxruntime_where)
if(onnxruntime_root)
  set(onnxruntime_where PATHS ${onnxruntime_root} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
endif()
find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h ${onnxruntime_where}
          PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime
                        onnxruntime/core/session)
find_library(OnnxRuntime_LIBRARY onnxruntime ${onnxruntime_where}
             PATH_SUFFIXES lib lib64)

# The version of the C interface is the second number of the version of ONNX Runtime.
if(OnnxRuntime_INCLUDE_DIR)
  file(STRINGS ${OnnxRuntime_INCLUDE_DIR}/onnxruntime_c_api.h api_line
       REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" api_version "${api_line}")
  set(OnnxRuntime_VERSION 1.${api_version})
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS OnnxRuntime_LIBRARY OnnxRuntime_INCLUDE_DIR
  VERSION_VAR OnnxRuntime_VERSION
  REASON_FAILURE_MESSAGE "set ONNXRUNTIME_ROOT to a folder with ONNX Runtime's include and lib")
mark_as_advanced(OnnxRuntime_INCLUDE_DIR OnnxRuntime_LIBRARY)

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
  # For a shared library CMake tells the linker where it lies, also to those who link to it through
  # another shared library.
  if(OnnxRuntime_LIBRARY MATCHES "\\.a$")
    add_library(OnnxRuntime::OnnxRuntime STATIC IMPORTED)
  else()
    add_library(OnnxRuntime::OnnxRuntime SHARED IMPORTED)
  endif()
  set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
    IMPORTED_LOCATION ${OnnxRuntime_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${OnnxRuntime_INCLUDE_DIR})
endif()
