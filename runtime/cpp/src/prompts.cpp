#include "prompts.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "errors.hpp"

namespace sam3rt {
namespace {

// The model has an embedding for it, which the masks depend on.
constexpr std::int64_t not_a_point = -1;
constexpr std::int64_t box_top_left = 2;
constexpr std::int64_t box_bottom_right = 3;
// How far outside a point is suspicious, in sides of the image.
constexpr float margin = 0.1F;

/// The points of one object.
struct ObjectPoints {
    std::size_t count;
    const float* coords;
    const std::int64_t* labels;
};

/// Every object's points, and the greatest number that one has.
struct Points {
    std::vector<ObjectPoints> objects;
    std::size_t most;
};

struct Boxes {
    std::size_t objects;
    const float* corners;
};

void require_finite(const Array<float>& array, const char* argument, const char* expected) {
    if (!is_finite(array)) {
        throw PromptError(argument, "NaN or infinite values",
                          std::string("finite numbers, ") + expected);
    }
}

void require_at_most(std::int64_t count, std::int64_t limit, const std::string& things,
                     const std::string& argument) {
    if (count > limit) {
        throw PromptError(argument, std::to_string(count) + " " + things,
                          "at most " + std::to_string(limit));
    }
}

/// Points of objects that have different numbers of them, one object after the other.
Points split_points(const Prompts& prompts) {
    const Array<std::int64_t>& counts = *prompts.point_counts;
    if (counts.shape().size() != 1) {
        throw PromptError("point_counts", "shape " + shape_text(counts.shape()), "[B]");
    }
    require_at_most(counts.shape()[0], max_objects, "objects", "point_counts");
    const Shape& shape = prompts.point_coords->shape();
    if (shape.size() != 2) {
        throw PromptError("point_coords", "shape " + shape_text(shape),
                          "[N, 2] where point_counts is given");
    }
    std::int64_t sum = 0;
    for (const std::int64_t count : counts) {
        if (count < 0) {
            throw PromptError("point_counts", std::to_string(count), "no negative number");
        }
        require_at_most(count, max_points, "points per object", "point_counts");
        sum += count;
    }
    if (sum != shape[0]) {
        throw PromptError("point_counts", "a sum of " + std::to_string(sum),
                          std::to_string(shape[0]) + ", the number of points");
    }
    Points points{{}, 0};
    std::size_t used = 0;
    for (const std::int64_t number : counts) {
        const auto count = static_cast<std::size_t>(number);
        points.objects.push_back(
            {count, prompts.point_coords->data() + 2 * used, prompts.point_labels->data() + used});
        used += count;
        points.most = std::max(points.most, count);
    }
    return points;
}

std::optional<Points> read_points(const Prompts& prompts) {
    if (!prompts.point_coords) {
        if (prompts.point_counts) {
            throw PromptError("point_coords", "None with point_counts given",
                              "the points that are counted");
        }
        if (prompts.point_labels) {
            throw PromptError("point_coords", "None with point_labels given",
                              "one point per label");
        }
        return std::nullopt;
    }
    if (!prompts.point_labels) {
        throw PromptError("point_labels", "None with point_coords given", "one label per point");
    }
    const char* const expected = "[N, 2] or [B, N, 2]";
    const Shape& shape = prompts.point_coords->shape();
    require_finite(*prompts.point_coords, "point_coords", expected);
    const bool batched = shape.size() == 3;
    if ((!batched && shape.size() != 2) || shape.back() != 2) {
        throw PromptError("point_coords", "shape " + shape_text(shape), expected);
    }
    if (!prompts.point_counts) {
        require_at_most(batched ? shape[0] : 1, max_objects, "objects", "point_coords");
        require_at_most(shape[shape.size() - 2], max_points, "points per object", "point_coords");
    }
    for (const std::int64_t label : *prompts.point_labels) {
        if (label < not_a_point || label > box_bottom_right) {
            throw PromptError("point_labels", std::to_string(label), "whole numbers -1..3");
        }
    }
    const Shape wanted(shape.begin(), shape.end() - 1);
    if (prompts.point_labels->shape() != wanted) {
        throw PromptError("point_labels", "shape " + shape_text(prompts.point_labels->shape()),
                          "one label per point, shape " + shape_text(wanted));
    }
    if (prompts.point_counts) {
        return split_points(prompts);
    }
    const auto most = static_cast<std::size_t>(shape[shape.size() - 2]);
    Points points{{}, most};
    for (std::size_t i = 0; i < (batched ? static_cast<std::size_t>(shape[0]) : 1); ++i) {
        points.objects.push_back({most, prompts.point_coords->data() + 2 * i * most,
                                  prompts.point_labels->data() + i * most});
    }
    return points;
}

std::string number_text(float value) {
    std::string text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    return text.back() == '.' ? text + "0" : text;
}

std::optional<Boxes> read_boxes(const std::optional<Array<float>>& box) {
    if (!box) {
        return std::nullopt;
    }
    require_finite(*box, "box", "[4] or [B, 4]");
    const Shape& shape = box->shape();
    if ((shape.size() != 1 && shape.size() != 2) || shape.back() != 4) {
        throw PromptError("box", "shape " + shape_text(shape), "[4] or [B, 4], x0, y0, x1, y1");
    }
    require_at_most(shape.size() == 2 ? shape[0] : 1, max_objects, "boxes", "box");
    const Boxes boxes{box->size() / 4, box->data()};
    for (std::size_t i = 0; i < boxes.objects; ++i) {
        const float* corner = boxes.corners + 4 * i;
        if (corner[2] < corner[0] || corner[3] < corner[1]) {
            throw PromptError("box",
                              "[" + number_text(corner[0]) + ", " + number_text(corner[1]) + ", " +
                                  number_text(corner[2]) + ", " + number_text(corner[3]) + "]",
                              "x0 <= x1 and y0 <= y1");
        }
    }
    return boxes;
}

std::optional<Array<float>> read_masks(const std::optional<Array<float>>& mask,
                                       const PromptSpec& spec) {
    if (!mask) {
        return std::nullopt;
    }
    const std::string size =
        std::to_string(spec.mask_size.height) + ", " + std::to_string(spec.mask_size.width) + "]";
    const std::string expected = "[1, " + size + " or [B, 1, " + size + " low-resolution logits";
    require_finite(*mask, "mask_input", expected.c_str());
    const Shape& shape = mask->shape();
    const Shape wanted = {1, spec.mask_size.height, spec.mask_size.width};
    if ((shape.size() != 3 && shape.size() != 4) ||
        !std::equal(wanted.begin(), wanted.end(), shape.end() - 3) || shape[0] == 0) {
        throw PromptError("mask_input", "shape " + shape_text(shape), expected);
    }
    const std::int64_t count = shape.size() == 4 ? shape[0] : 1;
    require_at_most(count, max_objects, "masks", "mask_input");
    // Much larger ones overflow within the decoder, which then returns NaN.
    if (!std::all_of(mask->begin(), mask->end(),
                     [](float logit) { return std::abs(logit) <= max_mask_logit; })) {
        throw PromptError("mask_input", "logits beyond " + number_text(max_mask_logit),
                          "low-resolution logits of an earlier call");
    }
    return Array<float>({count, wanted[1], wanted[2]}, mask->data(), mask->size());
}

std::size_t count_objects(const std::optional<Points>& points, const std::optional<Boxes>& boxes,
                          const std::optional<Array<float>>& masks) {
    if (points && boxes && points->objects.size() != boxes->objects) {
        throw PromptError(
            "box", std::to_string(boxes->objects) + " boxes",
            "one box per object of point_coords (" + std::to_string(points->objects.size()) + ")");
    }
    const std::size_t mask_count = masks ? static_cast<std::size_t>(masks->shape()[0]) : 1;
    if (!points && !boxes) {
        return mask_count;
    }
    const std::size_t objects = points ? points->objects.size() : boxes->objects;
    if (mask_count != 1 && mask_count != objects) {
        throw PromptError("mask_input", std::to_string(mask_count) + " masks",
                          "one mask, or one per object (" + std::to_string(objects) + ")");
    }
    return objects;
}

/// Appends labelled points to the rows of the decoder's inputs.
class Rows {
public:
    Rows(std::size_t objects, std::size_t points, const ImageGeometry& geometry, bool normalize)
        : points_({static_cast<std::int64_t>(objects), static_cast<std::int64_t>(points), 2}),
          labels_({static_cast<std::int64_t>(objects), static_cast<std::int64_t>(points)}),
          per_object_(points),
          size_{normalize ? static_cast<float>(geometry.original_size.width) : 1.0F,
                normalize ? static_cast<float>(geometry.original_size.height) : 1.0F},
          input_{static_cast<float>(geometry.input_size.width),
                 static_cast<float>(geometry.input_size.height)} {}

    /// Put image coordinates (x, y) at a position of an object.
    void put(std::size_t object, std::size_t position, const float* coords, std::int64_t label,
             const std::string& argument) {
        const std::size_t at = object * per_object_ + position;
        for (std::size_t axis = 0; axis < 2; ++axis) {
            const float mapped = coords[axis] / size_[axis] * input_[axis];
            if (!std::isfinite(mapped)) {
                throw PromptError(argument, "coordinates too large for float32",
                                  "coordinates near the image");
            }
            points_[2 * at + axis] = mapped;
        }
        labels_[at] = label;
    }

    /// Put a point at a position of an object that does not count.
    void pad(std::size_t object, std::size_t position) {
        const std::size_t at = object * per_object_ + position;
        points_[2 * at] = points_[2 * at + 1] = 0;
        labels_[at] = padding_label;
    }

    const float* point(std::size_t object, std::size_t position) const {
        return points_.data() + 2 * (object * per_object_ + position);
    }

    PackedPrompts finish(std::optional<Array<float>> masks, std::string warning) {
        return {std::move(points_), std::move(labels_), std::move(masks), std::move(warning)};
    }

private:
    Array<float> points_;
    Array<std::int64_t> labels_;
    std::size_t per_object_;
    float size_[2];
    float input_[2];
};

/// Finds, among points of the encoder's input, the one furthest outside the image.
class Outlier {
public:
    explicit Outlier(const ImageGeometry& geometry)
        : geometry_(geometry),
          sides_{static_cast<float>(geometry.input_size.width),
                 static_cast<float>(geometry.input_size.height)} {}

    void look_at(float x, float y) {
        for (const float* side : {&x, &y}) {
            const float size = sides_[side == &x ? 0 : 1];
            found_ = found_ || *side < -margin * size || *side > (1 + margin) * size;
        }
        const float distance =
            std::max(std::abs(x / sides_[0] - 0.5F), std::abs(y / sides_[1] - 0.5F));
        if (distance > distance_) {
            distance_ = distance;
            x_ = x / sides_[0] * static_cast<float>(geometry_.original_size.width);
            y_ = y / sides_[1] * static_cast<float>(geometry_.original_size.height);
        }
    }

    /// What to say, calling such a point `what`; empty where none is far outside.
    std::string warning(const char* what) const {
        if (!found_) {
            return "";
        }
        std::array<char, 64> place{};
        std::snprintf(place.data(), place.size(), "(%.6g, %.6g)", static_cast<double>(x_),
                      static_cast<double>(y_));
        const Size& size = geometry_.original_size;
        return std::string(what) + " at " + place.data() + " pixels, far outside the image of " +
               std::to_string(size.width) + " x " + std::to_string(size.height) +
               ": the masks mean nothing";
    }

private:
    const ImageGeometry& geometry_;
    float sides_[2];
    bool found_ = false;
    float distance_ = 0;
    float x_ = 0;
    float y_ = 0;
};

}  // namespace

PackedPrompts pack(const Prompts& prompts, const PromptSpec& spec, const ImageGeometry& geometry) {
    const std::optional<Points> points = read_points(prompts);
    const std::optional<Boxes> boxes = read_boxes(prompts.box);
    std::optional<Array<float>> masks = read_masks(prompts.mask_input, spec);
    const std::size_t objects = count_objects(points, boxes, masks);

    const bool padded =
        (points || boxes) && (spec.padding_point == PromptSpec::PaddingPoint::always || !boxes);
    const std::size_t clicks = points ? points->most : 0;
    const std::size_t corners = boxes ? 2 : 0;
    const bool box_first = spec.box_position == PromptSpec::BoxPosition::before_points;
    const std::size_t first_click = box_first ? corners : 0;
    const std::size_t first_corner = box_first ? 0 : clicks;
    const std::size_t count = clicks + corners + (padded ? 1 : 0);
    Rows rows(objects, count, geometry, prompts.normalize_coords);
    const float origin[2] = {0, 0};
    Outlier point(geometry);
    Outlier centre(geometry);
    for (std::size_t object = 0; object < objects; ++object) {
        for (std::size_t i = 0; i < clicks; ++i) {
            const ObjectPoints& own = points->objects[object];
            if (i >= own.count) {
                rows.pad(object, first_click + i);
                continue;
            }
            rows.put(object, first_click + i, own.coords + 2 * i, own.labels[i], "point_coords");
            if (own.labels[i] != not_a_point) {
                const float* place = rows.point(object, first_click + i);
                point.look_at(place[0], place[1]);
            }
        }
        for (std::size_t i = 0; i < corners; ++i) {
            rows.put(object, first_corner + i, boxes->corners + 4 * object + 2 * i,
                     i == 0 ? box_top_left : box_bottom_right, "box");
        }
        if (boxes) {
            const float* first = rows.point(object, first_corner);
            centre.look_at(first[0] / 2 + first[2] / 2, first[1] / 2 + first[3] / 2);
        }
        if (padded) {
            rows.put(object, count - 1, origin, not_a_point, "point_coords");
        }
    }
    std::string warning = point.warning("a point");
    if (warning.empty()) {
        warning = centre.warning("the centre of a box");
    }
    if (!points && !boxes && !masks) {
        warning = "no prompt: the masks are of whatever the model finds most prominent";
    }
    return rows.finish(std::move(masks), std::move(warning));
}

}  // namespace sam3rt
