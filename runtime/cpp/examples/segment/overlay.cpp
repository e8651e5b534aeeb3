#include "overlay.hpp"

#include <algorithm>
#include <cmath>

namespace {

using Colour = std::array<std::uint8_t, 3>;

// As in the Python runtime: Okabe and Ito's colour-blind-safe set, slightly more saturated.
constexpr std::array<Colour, 7> palette = {{{0, 132, 214},
                                            {240, 148, 0},
                                            {204, 95, 165},
                                            {240, 228, 66},
                                            {86, 196, 240},
                                            {213, 84, 0},
                                            {0, 158, 115}}};
constexpr double tint = 0.45;
constexpr Colour white = {255, 255, 255};
constexpr Colour foreground = {22, 170, 82};
constexpr Colour background = {222, 42, 52};

class Canvas {
public:
    explicit Canvas(const Picture& image)
        : picture_(image),
          // Lines grow with the image, but not in proportion: a thumbnail is seen from closer.
          line_(static_cast<std::int64_t>(
              1.0 + 2.0 * std::sqrt(static_cast<double>(image.height * image.width)) / 1000)) {}

    std::int64_t line() const { return line_; }
    const Picture& picture() const { return picture_; }

    void set(std::int64_t x, std::int64_t y, const Colour& colour) {
        if (x >= 0 && y >= 0 && x < picture_.width && y < picture_.height) {
            std::copy(colour.begin(), colour.end(), at(x, y));
        }
    }

    void mix(std::int64_t x, std::int64_t y, const Colour& colour, double share) {
        auto pixel = at(x, y);
        for (std::size_t channel = 0; channel < 3; ++channel, ++pixel) {
            *pixel = static_cast<std::uint8_t>(
                std::lround(*pixel * (1 - share) + colour[channel] * share));
        }
    }

    void fill(std::int64_t x0, std::int64_t y0, std::int64_t x1, std::int64_t y1,
              const Colour& colour) {
        x0 = std::max<std::int64_t>(x0, 0);
        y0 = std::max<std::int64_t>(y0, 0);
        x1 = std::min(x1, picture_.width);
        y1 = std::min(y1, picture_.height);
        for (std::int64_t y = y0; y < y1; ++y) {
            for (std::int64_t x = x0; x < x1; ++x) {
                set(x, y, colour);
            }
        }
    }

    void disc(std::int64_t x, std::int64_t y, std::int64_t radius, const Colour& colour) {
        for (std::int64_t dy = -radius; dy <= radius; ++dy) {
            for (std::int64_t dx = -radius; dx <= radius; ++dx) {
                if (dx * dx + dy * dy <= radius * radius) {
                    set(x + dx, y + dy, colour);
                }
            }
        }
    }

private:
    std::vector<std::uint8_t>::iterator at(std::int64_t x, std::int64_t y) {
        return picture_.pixels.begin() + (y * picture_.width + x) * 3;
    }

    Picture picture_;
    std::int64_t line_;
};

using Mask = std::vector<std::uint8_t>;

/// Whether any pixel within `reach` of (x, y), along its row or column, is not what (x, y) is.
bool near_edge(const Mask& mask, const Picture& image, std::int64_t x, std::int64_t y,
               std::int64_t reach) {
    const auto value = [&](std::int64_t px, std::int64_t py) {
        return px >= 0 && py >= 0 && px < image.width && py < image.height &&
               mask[static_cast<std::size_t>(py * image.width + px)] != 0;
    };
    const bool here = value(x, y);
    for (std::int64_t step = 1; step <= reach; ++step) {
        if (value(x + step, y) != here || value(x - step, y) != here ||
            value(x, y + step) != here || value(x, y - step) != here) {
            return true;
        }
    }
    return false;
}

/// A coloured line inside the mask's edge and a white one outside it.
void draw_mask(Canvas& canvas, const Mask& mask, const Colour& colour) {
    const Picture& image = canvas.picture();
    for (std::int64_t y = 0; y < image.height; ++y) {
        for (std::int64_t x = 0; x < image.width; ++x) {
            const bool inside = mask[static_cast<std::size_t>(y * image.width + x)] != 0;
            if (inside) {
                canvas.mix(x, y, colour, tint);
            }
            if (near_edge(mask, image, x, y, inside ? canvas.line() : 1)) {
                canvas.set(x, y, inside ? colour : white);
            }
        }
    }
}

std::int64_t to_pixel(float coordinate, std::int64_t size) {
    // Far outside is as invisible as just outside, and cannot overflow.
    const auto limit = static_cast<float>(2 * size);
    return static_cast<std::int64_t>(std::floor(std::clamp(coordinate, -limit, limit)));
}

void draw_box(Canvas& canvas, const std::array<float, 4>& box) {
    const Picture& image = canvas.picture();
    const std::int64_t x0 = to_pixel(box[0], image.width);
    const std::int64_t y0 = to_pixel(box[1], image.height);
    const std::int64_t x1 = std::max(to_pixel(box[2], image.width), x0 + 1);
    const std::int64_t y1 = std::max(to_pixel(box[3], image.height), y0 + 1);
    const auto frame = [&](std::int64_t inset, std::int64_t thickness, const Colour& colour) {
        const std::int64_t left = x0 + inset;
        const std::int64_t top = y0 + inset;
        const std::int64_t right = x1 - inset;
        const std::int64_t bottom = y1 - inset;
        canvas.fill(left, top, right, top + thickness, colour);
        canvas.fill(left, bottom - thickness, right, bottom, colour);
        canvas.fill(left, top, left + thickness, bottom, colour);
        canvas.fill(right - thickness, top, right, bottom, colour);
    };
    frame(0, canvas.line() + 2, white);
    frame(1, canvas.line(), foreground);
}

/// A disc with a plus or a minus, for those who cannot tell green from red.
void draw_click(Canvas& canvas, const Click& click) {
    const std::int64_t x = to_pixel(click.x, canvas.picture().width);
    const std::int64_t y = to_pixel(click.y, canvas.picture().height);
    const std::int64_t radius = 3 + 3 * canvas.line();
    const std::int64_t bar = radius / 2;
    const std::int64_t half = std::max<std::int64_t>(radius / 8, 0);
    canvas.disc(x, y, radius, white);
    canvas.disc(x, y, radius - canvas.line(), click.label == 1 ? foreground : background);
    canvas.fill(x - bar, y - half, x + bar + 1, y + half + 1, white);
    if (click.label == 1) {
        canvas.fill(x - half, y - bar, x + half + 1, y + bar + 1, white);
    }
}

}  // namespace

Picture draw_overlay(const Picture& image, const std::vector<Mask>& masks,
                     const std::vector<Click>& clicks,
                     const std::vector<std::array<float, 4>>& boxes) {
    Canvas canvas(image);
    for (std::size_t i = 0; i < masks.size(); ++i) {
        draw_mask(canvas, masks[i], palette[i % palette.size()]);
    }
    for (const auto& box : boxes) {
        draw_box(canvas, box);
    }
    for (const Click& click : clicks) {
        draw_click(canvas, click);
    }
    return canvas.picture();
}
