// From an image to the encoder's input, and from image coordinates to the input's.
#pragma once

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Where an image lies in the encoder's input.
struct ImageGeometry {
    /// Of the image.
    Size original_size;
    /// Of the part of the encoder's input that the image fills.
    Size input_size;

    bool operator==(const ImageGeometry& other) const {
        return original_size == other.original_size && input_size == other.input_size;
    }
};

/// Refuse what is not an image. Throws ImageError that calls it `argument`.
void check_image(const ImageView& image, const std::string& argument);

/// Whether an image may have this size.
bool is_image_size(const Size& size);

/// Where an image of a given size lies in the encoder's input.
ImageGeometry geometry_of(const ImageSpec& spec, const Size& original_size);

/// Resize, normalize and pad a checked image: float32 [1, 3, height, width] of the spec's size.
Array<float> preprocess(const ImageSpec& spec, const ImageView& image,
                        const ImageGeometry& geometry);

}  // namespace sam3rt
