// y[rows] += (x[rows] A) B, for many adapters in one call: the LoRA step of one linear layer.
//
// Rows are grouped by adapter. An adapter has one A with the columns of all slices of the layer side by side, and one B
// per slice. Both are stored as vectors of LANES columns (the last one padded with zeros): (columns / LANES, k, LANES),
// where k is n_in for A and the slice's rank for B, so that memory is read in order. If the processor multiplies pairs
// of bfloat16 (AVX512-BF16), A is stored in pairs along k: (columns / LANES, n_in / 2 rounded up, LANES, 2). Weights and
// activations are bfloat16 or float32; all sums, including the intermediate ones, are float32. Except for two
// AVX512-BF16 instructions, GCC's vector types keep this portable. serve/cpu/kernel.py compiles it at first use.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int TILE = 8;  // rows that share each loaded weight
constexpr int64_t SERIAL = 1 << 17;  // below this many multiply-adds, waking a second thread costs more than it saves

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
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    Words word = (Words)value;
    // Round to nearest, ties to even; a NaN keeps a mantissa bit.
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    Words nan = (Words)(value != value);
    Halves halves = __builtin_convertvector((rounded & ~nan) | (((word >> 16) | 0x40) & nan), Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

struct Adapter {
    const void* a;
    const void* b[8];
    int64_t columns, rank[8];
};

struct Layer {
    int64_t n_in, n_slices, n_out[8];
    const Adapter* adapters;  // by slot
};

// Rows of x and y by adapter: slots[i] has rows[starts[i]] to rows[starts[i + 1] - 1].
struct Groups {
    int64_t n;
    const int32_t *slots, *starts, *rows;
};

// An addition takes about four cycles and two can start per cycle, so at least this many sums run in parallel.
constexpr int CHAINS = 8;
// Weights stream from memory, and the processor's own prefetcher stops at a page's end: prefetch this far ahead.
constexpr int AHEAD = 128 * LANES;

template <typename T>
inline Floats stream(const T* from) {
    __builtin_prefetch(from + AHEAD);
    return load(from);
}

// What one step along k reads of x and A: one value of each, in float32.
template <typename T>
struct Step {
    static constexpr int K = 1;
    typedef float Input;
    typedef Floats Weight;
    static void read(int64_t n_in, const T* x, Input* to) {
        for (int64_t k = 0; k < n_in; ++k) to[k] = to_float(x[k]);
    }
    static Weight weight(const T* from) { return stream(from); }
    static Floats add(Floats sum, Weight weight, Input x) { return sum + weight * x; }
};

#ifdef __AVX512BF16__
// Two values of each, unconverted.
template <>
struct Step<bfloat16> {
    static constexpr int K = 2;
    typedef uint32_t Input;
    typedef __m512bh Weight;
    static void read(int64_t n_in, const bfloat16* x, Input* to) {
        to[(n_in - 1) / 2] = 0;
        std::memcpy(to, x, n_in * sizeof(bfloat16));
    }
    static Weight weight(const bfloat16* from) {
        __builtin_prefetch(from + AHEAD);
        __m512bh out;
        std::memcpy(&out, from, sizeof out);
        return out;
    }
    static Floats add(Floats sum, Weight weight, Input x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, weight, (__m512bh)_mm512_set1_epi32(x));
    }
};
#endif

// h (N, columns) = x A, for the C vectors of columns that start at `column`. A few sums are also split over k.
template <typename T, int N, int C>
void shrink_block(int64_t n_steps, int64_t columns, int64_t column, const T* a, const typename Step<T>::Input* x,
                  float* h) {
    constexpr int SPLIT = std::max(1, CHAINS / (N * C));
    Floats sum[SPLIT][N][C] = {};
    auto add = [&](int part, int64_t step) {
        typename Step<T>::Weight weight[C];
        for (int c = 0; c < C; ++c)
            weight[c] = Step<T>::weight(a + ((column / LANES + c) * n_steps + step) * LANES * Step<T>::K);
        for (int i = 0; i < N; ++i)
            for (int c = 0; c < C; ++c)
                sum[part][i][c] = Step<T>::add(sum[part][i][c], weight[c], x[i * n_steps + step]);
    };
    int64_t step = 0;
    for (; step + SPLIT <= n_steps; step += SPLIT)
        for (int part = 0; part < SPLIT; ++part) add(part, step + part);
    for (; step < n_steps; ++step) add(0, step);
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < C; ++c) {
            for (int part = 1; part < SPLIT; ++part) sum[0][i][c] += sum[part][i][c];
            store(h + i * columns + column + c * LANES, sum[0][i][c]);
        }
}

// h (N, columns) = x A, with dense x (N, n_steps).
template <typename T, int N>
void shrink(int64_t n_steps, const Adapter& adapter, const typename Step<T>::Input* x, float* h) {
    const T* a = static_cast<const T*>(adapter.a);
    int64_t column = 0;
    for (; column + 3 * LANES <= adapter.columns; column += 3 * LANES)
        shrink_block<T, N, 3>(n_steps, adapter.columns, column, a, x, h);
    if (column + 2 * LANES == adapter.columns)
        shrink_block<T, N, 2>(n_steps, adapter.columns, column, a, x, h);
    else if (column < adapter.columns)
        shrink_block<T, N, 1>(n_steps, adapter.columns, column, a, x, h);
}

// y += h B, for one slice's C vectors of columns that start at `column`; `width`: columns used in the last vector.
template <typename T, int N, int C>
void expand_block(int64_t rank, int64_t column, int64_t width, const T* b, const float* h,
                  int64_t h_stride, T* const* y) {
    Floats sum[N][C] = {};
    for (int64_t r = 0; r < rank; ++r) {
        Floats weight[C];
        for (int c = 0; c < C; ++c) weight[c] = stream(b + ((column / LANES + c) * rank + r) * LANES);
        for (int i = 0; i < N; ++i)
            for (int c = 0; c < C; ++c) sum[i][c] += weight[c] * h[i * h_stride + r];
    }
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < C; ++c) {
            T* to = y[i] + column + c * LANES;
            if (c < C - 1 || width == LANES) {
                store(to, load(to) + sum[i][c]);
            } else {
                T edge[LANES] = {};
                std::memcpy(edge, to, width * sizeof(T));
                store(edge, load(edge) + sum[i][c]);
                std::memcpy(to, edge, width * sizeof(T));
            }
        }
}

// y[rows] += h B, slice by slice.
template <typename T, int N>
void expand(const Layer& layer, const Adapter& adapter, const float* h, T* const* y) {
    constexpr int WIDE = std::max(2, CHAINS / N);  // columns per load of a value of h, in vectors
    int64_t h_at = 0, y_at = 0;
    for (int64_t slice = 0; slice < layer.n_slices; ++slice) {
        const int64_t n_out = layer.n_out[slice];
        const T* b = static_cast<const T*>(adapter.b[slice]);
        const int64_t rank = adapter.rank[slice];
        T* to[N];
        for (int i = 0; i < N; ++i) to[i] = y[i] + y_at;
        int64_t column = rank ? 0 : n_out;
        for (; column + WIDE * LANES <= n_out; column += WIDE * LANES)
            expand_block<T, N, WIDE>(rank, column, LANES, b, h + h_at, adapter.columns, to);
        for (; column < n_out; column += LANES)
            expand_block<T, N, 1>(rank, column, std::min<int64_t>(LANES, n_out - column), b, h + h_at,
                                  adapter.columns, to);
        h_at += rank;
        y_at += n_out;
    }
}

template <typename T, int N>
void tile(const Layer& layer, const Adapter& adapter, const T* x, int64_t x_stride, T* y, int64_t y_stride,
          const int32_t* rows) {
    static thread_local std::vector<typename Step<T>::Input> inputs;
    static thread_local std::vector<float> scratch;
    const int64_t n_steps = (layer.n_in + Step<T>::K - 1) / Step<T>::K;
    if (inputs.size() < size_t(N * n_steps)) inputs.resize(N * n_steps);
    if (scratch.size() < size_t(N * adapter.columns)) scratch.resize(N * adapter.columns);
    float* h = scratch.data();
    T* to[N];
    for (int i = 0; i < N; ++i) {
        Step<T>::read(layer.n_in, x + rows[i] * x_stride, inputs.data() + i * n_steps);
        to[i] = y + rows[i] * y_stride;
    }
    shrink<T, N>(n_steps, adapter, inputs.data(), h);
    expand<T, N>(layer, adapter, h, to);
}

// tile() for 1 row, 2 rows, ... TILE rows.
template <typename T>
constexpr decltype(&tile<T, 1>) OF_SIZE[TILE] = {tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>,
                                                 tile<T, 5>, tile<T, 6>, tile<T, 7>, tile<T, 8>};

template <typename T>
void lora(const Layer& layer, const T* x, int64_t x_stride, T* y, int64_t y_stride, const Groups& groups) {
    struct Work {
        int32_t slot, begin, count;
    };
    std::vector<Work> tiles;
    int64_t work = 0;
    for (int64_t group = 0; group < groups.n; ++group) {
        const Adapter& adapter = layer.adapters[groups.slots[group]];
        if (!adapter.columns) continue;  // this adapter does not change the layer
        const int32_t end = groups.starts[group + 1];
        for (int32_t at = groups.starts[group]; at < end; at += TILE)
            tiles.push_back({groups.slots[group], at, std::min<int32_t>(TILE, end - at)});
        work += (end - groups.starts[group]) * adapter.columns * layer.n_in * 2;
    }
    const int64_t n_tiles = int64_t(tiles.size());
#pragma omp parallel if (work > SERIAL && n_tiles > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < n_tiles; ++t) {
            const Work& item = tiles[t];
            const Adapter& adapter = layer.adapters[item.slot];
            OF_SIZE<T>[item.count - 1](layer, adapter, x, x_stride, y, y_stride, groups.rows + item.begin);
        }
    }
}

}  // namespace

#define EXPORT(name, T)                                                                                               \
    extern "C" void name(const Layer* layer, const void* x, int64_t x_stride, void* y, int64_t y_stride,              \
                         const Groups* groups) {                                                                      \
        lora<T>(*layer, static_cast<const T*>(x), x_stride, static_cast<T*>(y), y_stride, *groups);                   \
    }

// How many values along k are adjacent in A when weights are bfloat16.
extern "C" const int64_t bfloat16_along_k = Step<bfloat16>::K;

EXPORT(lora_bfloat16, bfloat16)
EXPORT(lora_float32, float)
