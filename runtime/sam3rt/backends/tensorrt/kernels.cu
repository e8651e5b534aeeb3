// What surrounds the network, on the GPU: the image's resize and normalization, small components,
// upsampling and threshold. NVRTC compiles this file as CUDA C++. A C++ compiler takes it as well,
// and then each kernel is a function: so tests hold it to what the host computes.
//
// Each kernel reads its sizes and addresses from a job in device memory, and loops over what there
// is to do. So one recorded launch serves every image size.

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ inline
#define BLOCK ((int)blockIdx.x)
#define BLOCKS ((int)gridDim.x)
#define THREAD ((int)threadIdx.x)
#define THREADS ((int)blockDim.x)
#else
#include <math.h>
#define KERNEL extern "C" void
#define DEVICE static inline
// A test may share the blocks out among threads.
static thread_local int BLOCK = 0;
static thread_local int BLOCKS = 1;
extern "C" void take_blocks(int first, int step) {
    BLOCK = first;
    BLOCKS = step;
}
#define THREAD 0
#define THREADS 1
static inline int atomicMin(int *target, int value) {
    int old = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(target, &old, value, false,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
static inline int atomicAdd(int *target, int value) {
    return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
#endif

// One image of another format to copy as RGB. Only the C++ runtime has a use for it, and its
// imaging.hpp the same struct.
struct ConvertJob {
    const unsigned char *image;  // first pixel of the first row
    unsigned char *rgb;          // [size[0], size[1], 3]
    long long row_stride;        // bytes from one row to the next, which may be negative
    long long plane_stride;      // bytes from one plane to the next; 0 without planes
    int size[2];                 // (height, width)
    int step;                    // bytes from one pixel of a row to the next
    int places[3];               // where in a pixel red, green and blue stand
    int matrix[5];               // of NV12, with 20 fractional bits; matrix[0] is 0 for other formats
};

DEVICE unsigned char color(int sum) {
    const int value = sum >> 20;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

KERNEL convert_image(const ConvertJob *job) {
    const int *matrix = job->matrix;
    for (int y = BLOCK; y < job->size[0]; y += BLOCKS) {
        const unsigned char *row = job->image + y * job->row_stride;
        const unsigned char *chroma = job->image + job->plane_stride + y / 2 * job->row_stride;
        unsigned char *out = job->rgb + 3LL * y * job->size[1];
        for (int x = THREAD; x < job->size[1]; x += THREADS) {
            unsigned char *pixel = out + 3LL * x;
            if (!matrix[0]) {
                for (int c = 0; c < 3; c++)
                    pixel[c] = row[(long long)x * job->step + job->places[c] + c * job->plane_stride];
                continue;
            }
            const int luma = (row[x] > 16 ? row[x] - 16 : 0) * matrix[0] + (1 << 19);
            const int u = chroma[x / 2 * 2] - 128, v = chroma[x / 2 * 2 + 1] - 128;
            pixel[0] = color(luma + matrix[1] * v);
            pixel[1] = color(luma + matrix[2] * u + matrix[3] * v);
            pixel[2] = color(luma + matrix[4] * u);
        }
    }
}

// One image to resize. The layout is that of RESIZE_JOB in imaging.py.
struct ResizeJob {
    const unsigned char *image;  // [height, width, 3]
    float *pixels;               // [3, side[0], side[1]]
    // For both axes, what each output takes of the inputs: the first and how many, and weights.
    int *spans;      // [filled[0] + filled[1], 2]
    float *weights;  // [filled[0] * taps[0] + filled[1] * taps[1]]
    int source[2];   // (height, width) of the image
    int filled[2];   // of the part of the encoder's input that it fills
    int side[2];     // of the encoder's input
    int taps[2];     // the most inputs that an output takes
    int rounds;      // whether values are rounded to whole levels after either axis
    float pad;
    float mean[3];
    float std[3];
};

// Weights of Pillow's bilinear resize (precompute_coeffs of its Resample.c), in its order of
// operations. Where values are rounded, they are whole numbers with 22 fractional bits.
KERNEL resize_weights(const ResizeJob *job) {
    const int outputs = job->filled[0] + job->filled[1];
    for (int i = BLOCK * THREADS + THREAD; i < outputs; i += BLOCKS * THREADS) {
        const int axis = i < job->filled[0] ? 0 : 1;
        const int out = axis ? i - job->filled[0] : i;
        float *weights = job->weights + (axis ? job->filled[0] * job->taps[0] : 0);
        weights += out * job->taps[axis];
        const int inputs = job->source[axis];
        const double scale = (double)inputs / job->filled[axis];
        const double support = scale > 1.0 ? scale : 1.0;
        const double center = (out + 0.5) * scale;
        int first = (int)(center - support + 0.5);
        first = first > 0 ? first : 0;
        int last = (int)(center + support + 0.5);
        last = last < inputs ? last : inputs;
        double sum = 0.0;
        for (int pass = 0; pass < 2; pass++) {
            double total = 0.0;
            for (int x = first; x < last; x++) {
                double away = (x - center + 0.5) / support;
                away = away < 0.0 ? -away : away;
                const double weight = away < 1.0 ? 1.0 - away : 0.0;
                total += weight;
                if (pass) {
                    const double share = weight / sum;
                    weights[x - first] =
                        job->rounds ? (float)(int)(share * (1 << 22) + 0.5) : (float)share;
                }
            }
            sum = total;
        }
        job->spans[2 * i] = first;
        job->spans[2 * i + 1] = last - first;
    }
}

DEVICE int level(int sum) {
    const int value = sum >> 22;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

// Columns are mixed before rows, as Pillow does unless an image loses many more rows than columns.
KERNEL resize_image(const ResizeJob *job) {
    const int plane = job->side[0] * job->side[1];
    const int half = 1 << 21;
    for (int y = BLOCK; y < job->side[0]; y += BLOCKS) {
        for (int x = THREAD; x < job->side[1]; x += THREADS) {
            float *pixel = job->pixels + y * job->side[1] + x;
            if (y >= job->filled[0] || x >= job->filled[1]) {
                for (int c = 0; c < 3; c++) pixel[c * plane] = job->pad;
                continue;
            }
            const int *rows = job->spans + 2 * y;
            const int *columns = job->spans + 2 * (job->filled[0] + x);
            const float *row_weights = job->weights + y * job->taps[0];
            const float *column_weights =
                job->weights + job->filled[0] * job->taps[0] + x * job->taps[1];
            float sums[3] = {0.0f, 0.0f, 0.0f};
            int levels[3] = {half, half, half};
            for (int i = 0; i < rows[1]; i++) {
                const unsigned char *line =
                    job->image + 3 * ((long long)(rows[0] + i) * job->source[1] + columns[0]);
                if (job->rounds) {
                    int inner[3] = {half, half, half};
                    for (int k = 0; k < columns[1]; k++)
                        for (int c = 0; c < 3; c++)
                            inner[c] += line[3 * k + c] * (int)column_weights[k];
                    for (int c = 0; c < 3; c++)
                        levels[c] += level(inner[c]) * (int)row_weights[i];
                } else {
                    float inner[3] = {0.0f, 0.0f, 0.0f};
                    for (int k = 0; k < columns[1]; k++)
                        for (int c = 0; c < 3; c++) inner[c] += line[3 * k + c] * column_weights[k];
                    for (int c = 0; c < 3; c++) sums[c] += inner[c] * row_weights[i];
                }
            }
            for (int c = 0; c < 3; c++) {
                const float value = job->rounds ? (float)level(levels[c]) : sums[c];
                pixel[c * plane] = (value - job->mean[c]) / job->std[c];
            }
        }
    }
}

// Masks to make of one decoder call. The layout is that of MASK_JOB in imaging.py.
struct MaskJob {
    const float *logits;   // [planes, size[0], size[1]]
    float *cleaned;        // the same without small components
    int *parents;          // [planes, size[0], size[1]], for their search
    int *areas;            // the same
    unsigned char *masks;  // [planes, target[0], target[1]]
    int planes;            // 0: there is nothing to make
    int size[2];           // (height, width) of the logits
    int kept[2];           // of the part of the encoder's input that the image fills
    int target[2];         // of the image
    int padded[2];         // of the encoder's input; 0 where logits are resized to the image at once
    float first_step[2];   // inputs per output, from the logits to the encoder's input
    float step[2];         // inputs per output of the only resize, or of the second
    int max_hole;          // background components of at most this many pixels are filled
    int max_sprinkle;      // foreground components of at most this many are removed
    float threshold;
};

DEVICE bool cleans(const MaskJob *job) { return job->max_hole > 0 || job->max_sprinkle > 0; }

// A forest over the pixels, as in union by smallest number: a root's parent is itself.
DEVICE int root_of(const int *parents, int node) {
    const volatile int *read = parents;
    int parent = read[node];
    while (parent != node) {
        node = parent;
        parent = read[node];
    }
    return node;
}

DEVICE void join(int *parents, int a, int b) {
    while (true) {
        a = root_of(parents, a);
        b = root_of(parents, b);
        if (a == b) return;
        if (a < b) {
            const int larger = b;
            b = a;
            a = larger;
        }
        const int old = atomicMin(parents + a, b);
        if (old == a) return;
        a = old;  // somebody was faster: what a was joined to must be joined instead
    }
}

// Each pixel belongs to its run's first one.
KERNEL find_runs(const MaskJob *job) {
    if (!cleans(job)) return;
    const int width = job->size[1];
    for (int row = BLOCK; row < job->planes * job->size[0]; row += BLOCKS) {
        const float *logits = job->logits + row * width;
        for (int x = THREAD; x < width; x += THREADS) {
            const bool inside = logits[x] > job->threshold;
            int first = x;
            while (first > 0 && (logits[first - 1] > job->threshold) == inside) first--;
            job->parents[row * width + x] = row * width + first;
            job->areas[row * width + x] = 0;
        }
    }
}

// Runs of neighbouring rows that touch belong together, corners included. Of the pixels where two
// runs touch, only those join them whose neighbour to the left or right does not.
KERNEL join_runs(const MaskJob *job) {
    if (!cleans(job)) return;
    const int height = job->size[0], width = job->size[1];
    for (int row = BLOCK; row < job->planes * height; row += BLOCKS) {
        if (row % height == 0) continue;
        const float *here = job->logits + row * width;
        const float *above = here - width;
        for (int x = THREAD; x < width; x += THREADS) {
            const bool inside = here[x] > job->threshold;
            const bool has_left = x > 0, has_right = x + 1 < width;
            const bool left = has_left && (here[x - 1] > job->threshold) == inside;
            const bool right = has_right && (here[x + 1] > job->threshold) == inside;
            const bool up_left = has_left && (above[x - 1] > job->threshold) == inside;
            const bool up_right = has_right && (above[x + 1] > job->threshold) == inside;
            const int i = row * width + x;
            if ((above[x] > job->threshold) == inside) {
                if (!(left && up_left)) join(job->parents, i, i - width);
            } else {
                if (up_left && !left) join(job->parents, i, i - width - 1);
                if (up_right && !right) join(job->parents, i, i - width + 1);
            }
        }
    }
}

// Areas are counted until they are known to be too large, so that a large component's pixels do
// not wait for each other.
KERNEL count_areas(const MaskJob *job) {
    if (!cleans(job)) return;
    const int width = job->size[1];
    const int most = job->max_hole > job->max_sprinkle ? job->max_hole : job->max_sprinkle;
    const volatile int *areas = job->areas;
    for (int row = BLOCK; row < job->planes * job->size[0]; row += BLOCKS) {
        for (int x = THREAD; x < width; x += THREADS) {
            const int root = root_of(job->parents, row * width + x);
            if (areas[root] <= most) atomicAdd(job->areas + root, 1);
        }
    }
}

KERNEL clean_logits(const MaskJob *job) {
    if (!cleans(job)) return;
    const int width = job->size[1];
    for (int row = BLOCK; row < job->planes * job->size[0]; row += BLOCKS) {
        for (int x = THREAD; x < width; x += THREADS) {
            const int i = row * width + x;
            const int area = job->areas[root_of(job->parents, i)];
            float value = job->logits[i];
            if (value > job->threshold) {
                if (area <= job->max_sprinkle) value = job->threshold - 10.0f;
            } else if (area <= job->max_hole) {
                value = job->threshold + 10.0f;
            }
            job->cleaned[i] = value;
        }
    }
}

// What one output takes of two neighbouring inputs.
struct Taps {
    int lower;
    int upper;
    float fraction;
};

// Half-pixel centres, clamped at the borders, and rounded once, as in PyTorch.
DEVICE Taps taps_of(int output, float step, int inputs) {
    float center = fmaf(step, output + 0.5f, -0.5f);
    center = center > 0.0f ? center : 0.0f;
    Taps taps;
    taps.lower = (int)center;
    if (taps.lower >= inputs - 1) {
        taps.lower = taps.upper = inputs - 1;
        taps.fraction = 0.0f;
    } else {
        taps.upper = taps.lower + 1;
        taps.fraction = center - taps.lower;
    }
    return taps;
}

DEVICE float mix(float lower, float upper, float fraction) {
    return (1.0f - fraction) * lower + fraction * upper;
}

DEVICE float sample(const float *plane, int width, Taps rows, Taps columns) {
    const float *lower = plane + rows.lower * width, *upper = plane + rows.upper * width;
    return mix(mix(lower[columns.lower], lower[columns.upper], columns.fraction),
               mix(upper[columns.lower], upper[columns.upper], columns.fraction), rows.fraction);
}

KERNEL make_masks(const MaskJob *job) {
    const int height = job->size[0], width = job->size[1];
    const float *logits = cleans(job) ? job->cleaned : job->logits;
    for (int row = BLOCK; row < job->planes * job->target[0]; row += BLOCKS) {
        const float *plane = logits + row / job->target[0] * height * width;
        unsigned char *mask = job->masks + (long long)row * job->target[1];
        const int y = row % job->target[0];
        if (!job->padded[0]) {
            const Taps rows = taps_of(y, job->step[0], height);
            for (int x = THREAD; x < job->target[1]; x += THREADS) {
                const Taps columns = taps_of(x, job->step[1], width);
                mask[x] = sample(plane, width, rows, columns) > job->threshold;
            }
            continue;
        }
        // Resized to the encoder's input, cut to what the image fills, resized to the image.
        const Taps rows = taps_of(y, job->step[0], job->kept[0]);
        const Taps lower = taps_of(rows.lower, job->first_step[0], height);
        const Taps upper = taps_of(rows.upper, job->first_step[0], height);
        for (int x = THREAD; x < job->target[1]; x += THREADS) {
            const Taps columns = taps_of(x, job->step[1], job->kept[1]);
            const Taps left = taps_of(columns.lower, job->first_step[1], width);
            const Taps right = taps_of(columns.upper, job->first_step[1], width);
            const float value =
                mix(mix(sample(plane, width, lower, left), sample(plane, width, lower, right),
                        columns.fraction),
                    mix(sample(plane, width, upper, left), sample(plane, width, upper, right),
                        columns.fraction),
                    rows.fraction);
            mask[x] = value > job->threshold;
        }
    }
}
