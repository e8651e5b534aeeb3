# Finds ONNX Runtime's C++ headers and library: OnnxRuntime::OnnxRuntime.
#
# ONNXRUNTIME_ROOT, or CMAKE_PREFIX_PATH, says where: an unpacked release of ONNX Runtime, or a
# system's package. Headers may lie in include, include/onnxruntime or
# include/onnxruntime/core/session.

find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h
          HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT}
          PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime
                        onnxruntime/core/session)
find_library(OnnxRuntime_LIBRARY onnxruntime
             HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT}
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
