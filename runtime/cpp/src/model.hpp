// What a Model's copies share.
#pragma once

#include "backend.hpp"
#include "bundle.hpp"
#include "sam3rt/sam3rt.hpp"
#include "upsampling.hpp"

namespace sam3rt {

struct Model::Data {
    Data(Bundle opened, const ModelOptions& options)
        : bundle(std::move(opened)), backend(bundle, options) {}

    const Bundle bundle;
    const Backend backend;
    mutable ResamplingCache resampling;
};

}  // namespace sam3rt
