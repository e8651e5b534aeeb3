// Stands in for NVIDIA's runtime compiler, libnvrtc.so.12: what it makes of a program is its text.

#include <cstring>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

API int nvrtcCreateProgram(std::string** program, const char* source, const char*, int,
                           const char* const*, const char* const*) {
    *program = new std::string(source);
    return 0;
}
API int nvrtcCompileProgram(std::string*, int count, const char* const* options) {
    return count == 2 && std::strcmp(options[0], "--gpu-architecture=sm_89") == 0 &&
                   std::strcmp(options[1], "--fmad=false") == 0
               ? 0
               : 5;
}
API int nvrtcGetProgramLogSize(std::string*, std::size_t* size) {
    *size = sizeof("no such option");
    return 0;
}
API int nvrtcGetProgramLog(std::string*, char* log) {
    std::memcpy(log, "no such option", sizeof("no such option"));
    return 0;
}
API int nvrtcGetCUBINSize(std::string* program, std::size_t* size) {
    *size = program->size() + 1;
    return 0;
}
API int nvrtcGetCUBIN(std::string* program, char* image) {
    std::memcpy(image, program->c_str(), program->size() + 1);
    return 0;
}
API int nvrtcDestroyProgram(std::string** program) {
    delete *program;
    return 0;
}
