// y[rows] += scale * (x[rows] A) B, for many adapters in one call: the LoRA step of one linear layer.
//
// Rows come grouped by adapter. An adapter holds A for all slices of the layer side by side, (n_in, rank) with rank
// rounded up to LANES, and one B per slice, (rank of the slice, n_out of the slice rounded up to LANES). Weights and
// activations are bfloat16 or float32; all arithmetic, the intermediate too, is float32. GCC's vector types keep this
// free of any one processor's intrinsics. Compiled at first use by serve/cpu_kernel.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int TILE = 8;  // rows that share each weight loaded
constexpr int64_t SERIAL = 1 << 17;  // multiply-adds under which waking a second thread costs more than it saves

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
    uint32_t word = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &word, 4);
    return out;
}

inline Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Floats load(const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(bfloat16* to, Floats value) {
    Words word = (Words)value;
    // Round to nearest, ties to even; a NaN keeps a mantissa bit.
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    Words nan = (Words)(value != value);
    Halves halves = __builtin_convertvector((rounded & ~nan) | (((word >> 16) | 0x40) & nan), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

struct Layer {
    int64_t n_in, n_slices, n_out[8];
};

struct Adapter {
    const void* a;
    const void* b[8];
    int64_t columns, rank[8];
};

// h (n, columns) = x[rows] A, for at most TILE rows.
template <typename T, int N>
void shrink(const Layer& layer, const Adapter& adapter, const float* x, float* h) {
    const T* a = static_cast<const T*>(adapter.a);
    for (int64_t column = 0; column < adapter.columns; column += LANES) {
        Floats sum[N] = {};
        for (int64_t k = 0; k < layer.n_in; ++k) {
            Floats weight = load(a + k * adapter.columns + column);
            for (int i = 0; i < N; ++i) sum[i] += weight * x[i * layer.n_in + k];
        }
        for (int i = 0; i < N; ++i) store(h + i * adapter.columns + column, sum[i]);
    }
}

// y[rows] += h B, slice by slice.
template <typename T, int N>
void expand(const Layer& layer, const Adapter& adapter, const float* h, T* const* y) {
    int64_t h_at = 0, y_at = 0;
    for (int64_t slice = 0; slice < layer.n_slices; ++slice) {
        const int64_t n_out = layer.n_out[slice], stride = (n_out + LANES - 1) / LANES * LANES;
        const T* b = static_cast<const T*>(adapter.b[slice]);
        const int64_t rank = adapter.rank[slice];
        for (int64_t column = 0; rank && column < n_out; column += LANES) {
            Floats sum[N] = {};
            for (int64_t r = 0; r < rank; ++r) {
                Floats weight = load(b + r * stride + column);
                for (int i = 0; i < N; ++i) sum[i] += weight * h[i * adapter.columns + h_at + r];
            }
            const int64_t width = std::min<int64_t>(LANES, n_out - column);
            for (int i = 0; i < N; ++i) {
                T* to = y[i] + y_at + column;
                if (width == LANES) {
                    store(to, load(to) + sum[i]);
                } else {
                    T edge[LANES] = {};
                    std::memcpy(edge, to, width * sizeof(T));
                    store(edge, load(edge) + sum[i]);
                    std::memcpy(to, edge, width * sizeof(T));
                }
            }
        }
        h_at += rank;
        y_at += n_out;
    }
}

template <typename T, int N>
void tile(const Layer& layer, const Adapter& adapter, const T* x, int64_t x_stride, T* y, int64_t y_stride,
          const int32_t* rows, float scale, std::vector<float>& scratch) {
    scratch.resize(N * (layer.n_in + adapter.columns));
    float* wide = scratch.data();
    float* h = wide + N * layer.n_in;
    T* to[N];
    for (int i = 0; i < N; ++i) {
        const T* from = x + rows[i] * x_stride;
        for (int64_t k = 0; k < layer.n_in; ++k) wide[i * layer.n_in + k] = to_float(from[k]) * scale;
        to[i] = y + rows[i] * y_stride;
    }
    shrink<T, N>(layer, adapter, wide, h);
    expand<T, N>(layer, adapter, h, to);
}

// tile() for 1 row, 2 rows, ... TILE rows.
template <typename T>
constexpr decltype(&tile<T, 1>) OF_SIZE[TILE] = {tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>,
                                                 tile<T, 5>, tile<T, 6>, tile<T, 7>, tile<T, 8>};

template <typename T>
void lora(const Layer& layer, const Adapter* adapters, const T* x, int64_t x_stride, T* y, int64_t y_stride,
          int64_t n_groups, const int32_t* slots, const int32_t* starts, const int32_t* rows, float scale) {
    struct Work {
        int32_t slot, begin, count;
    };
    std::vector<Work> tiles;
    int64_t work = 0;
    for (int64_t group = 0; group < n_groups; ++group) {
        const Adapter& adapter = adapters[slots[group]];
        if (!adapter.columns) continue;  // this adapter leaves the layer alone
        for (int32_t at = starts[group]; at < starts[group + 1]; at += TILE)
            tiles.push_back({slots[group], at, std::min<int32_t>(TILE, starts[group + 1] - at)});
        work += (starts[group + 1] - starts[group]) * adapter.columns * layer.n_in * 2;
    }
    const int64_t n_tiles = int64_t(tiles.size());
#pragma omp parallel if (work > SERIAL && n_tiles > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < n_tiles; ++t) {
            const Work& item = tiles[t];
            const Adapter& adapter = adapters[item.slot];
            const int32_t* of = rows + item.begin;
            OF_SIZE<T>[item.count - 1](layer, adapter, x, x_stride, y, y_stride, of, scale, scratch);
        }
    }
}

}  // namespace

#define EXPORT(name, T)                                                                                               \
    extern "C" void name(const Layer* layer, const Adapter* adapters, const void* x, int64_t x_stride, void* y,       \
                         int64_t y_stride, int64_t n_groups, const int32_t* slots, const int32_t* starts,             \
                         const int32_t* rows, float scale) {                                                          \
        lora<T>(*layer, adapters, static_cast<const T*>(x), x_stride, static_cast<T*>(y), y_stride, n_groups, slots,  \
                starts, rows, scale);                                                                                 \
    }

EXPORT(lora_bfloat16, bfloat16)
EXPORT(lora_float32, float)
