// The operator behind dynamic_local_filter and its gradients; each makes one pass over the filters.
// local_filter_plain.py does the same in PyTorch; local_filter_native.py builds and calls this file.
//
// For the letters see local_filter.py. A tile holds all taps of a part of a row of pixels: (K, width), K = Kh * Kw.
// Sums have type T; filters and their gradient have type P. Results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 128;  // largest width of a tile
constexpr int64_t ROW = COLUMNS + 16;  // stride from tap to tap: with a stride of 2^n they would share cache sets
constexpr double LOG2E = 1.4426950408889634;

struct Strides {
  int64_t b, g, k, h, w;
};

template <typename T, typename P>
struct Filtering {
  const T* x;  // (B, G, C, H + Kh - 1, W + Kw - 1)
  const P* filters;
  T *y, *stats;  // (B, G, C, H, W); (2, B, G, H, W): -m * log2(e) and s, null without softmax
  const T* grad_y;  // this and the following two are used by backward only
  T* grad_x;  // (parts, B, G, C, rows + Kh - 1, row_size), zeros that each part of the rows adds to; may be null
  P* grad_filters;  // may be null
  int64_t B, G, C, Kh, Kw, H, W, rows, row_size;
  Strides of_filters, of_gradient;

  int64_t K() const {
    return Kh * Kw;
  }
  int64_t x_width() const {
    return W + Kw - 1;
  }
  int64_t x_plane() const {
    return (H + Kh - 1) * x_width();
  }
};

// Calls f(j, count) for each vector of a row; only the last count may be smaller than a vector.
template <typename V, typename F>
inline void each(int64_t width, F f) {
  int64_t j = 0;
  for (; j + V::size() <= width; j += V::size()) {
    f(j, std::integral_constant<int, V::size()>());
  }
  if (j < width) {
    f(j, static_cast<int>(width - j));
  }
}

template <typename T>
inline auto load(const T* from, int count = at::vec::Vectorized<T>::size()) {
  using V = at::vec::Vectorized<T>;
  return count == V::size() ? V::loadu(from) : V::loadu(from, count);
}

inline at::vec::Vectorized<double> exp2(at::vec::Vectorized<double> z) {
  return z.exp2();
}

// 2^z for z <= 0, to 3 units in the last place; 0 below 2^-126.
inline at::vec::Vectorized<float> exp2(at::vec::Vectorized<float> z) {
  using V = at::vec::Vectorized<float>;
  using I = at::vec::Vectorized<int32_t>;
  using at::vec::fmadd;
  z = at::vec::clamp_min(z, V(-127));
  // Numbers as large as shift have no fraction, so adding it rounds z; the low bits become the exponent of 2^n.
  const V shift((3 << 22) + 127), shifted = z + shift, r = z - (shifted - shift);
  const V low = fmadd(r, V(0.69314694f), V(1)), middle = fmadd(r, V(0.05550713f), V(0.2402212f));
  const V high = fmadd(r, V(0.0013276472f), V(0.009675541f)), square = r * r;
  const V power = fmadd(fmadd(high, square, middle), square, low);  // 2^r, |r| <= 1/2
  return power * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << I(23));
}

// Transposes (M, N) to (N, M).
template <typename T>
void transpose(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t M, int64_t N) {
  constexpr int S = at::vec::Vectorized<T>::size();
  for (int64_t m = 0; m < M; m += S) {
    for (int64_t n = 0; n < N; n += S) {
      const T* block = from + m * from_row + n;
      T* target = to + n * to_row + m;
      if (m + S <= M && n + S <= N) {
        at::vec::transpose_mxn<T, S, S>(block, from_row, target, to_row);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(S, M - m); ++i) {
          for (int64_t j = 0; j < std::min<int64_t>(S, N - n); ++j) {
            target[j * to_row + i] = block[i * from_row + j];
          }
        }
      }
    }
  }
}

// Prefetches one of several equal parts of a tile, so that it is loaded while another tile is being computed.
template <int FOR_WRITING, typename P>
inline void prefetch(const P* memory, const Strides& of, int64_t K, int64_t width, int64_t part, int64_t parts) {
  constexpr int64_t LINE = 64 / sizeof(P);
  const bool rows = of.w == 1;
  const int64_t count = rows ? K : width, length = rows ? width : K, stride = rows ? of.k : of.w;
  for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r) {
    for (int64_t i = 0; i < length; i += LINE) {
      __builtin_prefetch(memory + r * stride + i, FOR_WRITING);
    }
  }
}

// Reads filters into a tile: by rows if they are contiguous, by columns if they are channels_last; buffer (vector, K).
template <typename T, typename P>
void read(const P* from, const Strides& of, int64_t K, int64_t width, T* tile, T* buffer) {
  constexpr int64_t S = at::vec::Vectorized<T>::size();
  if (of.w == 1) {
    for (int64_t k = 0; k < K; ++k) {
      std::copy(from + k * of.k, from + k * of.k + width, tile + k * ROW);
    }
    return;
  }
  for (int64_t j = 0; j < width; j += S) {
    const int64_t count = std::min(S, width - j);
    if constexpr (std::is_same_v<T, P>) {
      transpose(from + j * of.w, of.w, tile + j, ROW, count, K);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::copy(from + (j + i) * of.w, from + (j + i) * of.w + K, buffer + i * K);
      }
      transpose(buffer, K, tile + j, ROW, count, K);
    }
  }
}

// Copies to memory, if possible with stores that do not read it into the cache first, which saves bandwidth.
template <typename P>
void stream(const P* from, int64_t count, P* to) {
#ifdef __AVX2__
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && count * sizeof(P) % 32 == 0) {
    for (int64_t i = 0; i < count; i += 32 / sizeof(P)) {
      const auto* piece = reinterpret_cast<const __m256i*>(from + i);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(piece));
    }
    return;
  }
#endif
  std::copy(from, from + count, to);
}

// Writes a tile to memory; room (vector, K) of P.
template <typename T, typename P>
void write(const T* tile, int64_t K, int64_t width, P* to, const Strides& of, T* buffer, P* room) {
  constexpr int64_t S = at::vec::Vectorized<T>::size();
  const auto narrow = [&](const T* from, int64_t count) -> const P* {
    if constexpr (std::is_same_v<T, P>) {
      return from;
    } else {
      std::copy(from, from + count, room);
      return room;
    }
  };
  if (of.w == 1) {
    for (int64_t k = 0; k < K; ++k) {
      stream(narrow(tile + k * ROW, width), width, to + k * of.k);
    }
    return;
  }
  for (int64_t j = 0; j < width; j += S) {
    const int64_t count = std::min(S, width - j);
    transpose(tile + j, ROW, buffer, K, K, count);
    const P* pixels = narrow(buffer, count * K);
    if (of.w == K) {
      stream(pixels, count * K, to + j * K);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::copy(pixels + i * K, pixels + i * K + K, to + (j + i) * of.w);
      }
    }
  }
}

// Calls f(first, count) for up to four channels at a time: more do not fit in registers.
template <typename F>
inline void by_channels(int64_t C, F f) {
  for (int64_t c = 0; c < C; c += 4) {
    switch (C - c) {
      case 1:
        f(c, std::integral_constant<int, 1>());
        break;
      case 2:
        f(c, std::integral_constant<int, 2>());
        break;
      case 3:
        f(c, std::integral_constant<int, 3>());
        break;
      default:
        f(c, std::integral_constant<int, 4>());
    }
  }
}

// Largest of K taps for one vector of pixels. Four independent maxima let the processor overlap the comparisons.
template <typename T>
inline at::vec::Vectorized<T> largest(const T* taps, int64_t K) {
  using at::vec::clamp_min;
  at::vec::Vectorized<T> m[4];
  std::fill(m, m + 4, load(taps));
  int64_t k = 1;
  for (; k + 4 <= K; k += 4) {
    for (int a = 0; a < 4; ++a) {
      m[a] = clamp_min(load(taps + (k + a) * ROW), m[a]);
    }
  }
  for (; k < K; ++k) {
    m[0] = clamp_min(load(taps + k * ROW), m[0]);
  }
  return clamp_min(clamp_min(m[0], m[1]), clamp_min(m[2], m[3]));
}

// Computes y of N channels for one vector of pixels and returns the sum of e; if kept, e overwrites the logits.
// Loop bounds are copied to local variables: the compiler would read members again after every store.
template <int N, bool LOGITS, typename T, typename P, typename V, typename C>
inline V filter(const Filtering<T, P>& s, const T* window, T* taps, V minus_m, V (&y)[N], bool kept, C count) {
  const int64_t Kh = s.Kh, Kw = s.Kw, width = s.x_width(), plane = s.x_plane();
  V sum(0), of[N];
  std::fill(of, of + N, V(0));
  for (int64_t u = 0; u < Kh; ++u, window += width) {
    for (int64_t v = 0; v < Kw; ++v, taps += ROW) {
      V e = load(taps);
      if constexpr (LOGITS) {
        e = exp2(at::vec::fmadd(e, V(static_cast<T>(LOG2E)), minus_m));
        sum = sum + e;
        if (kept) {
          e.store(taps);
        }
      }
      for (int a = 0; a < N; ++a) {
        of[a] = at::vec::fmadd(e, load(window + a * plane + v, count), of[a]);
      }
    }
  }
  std::copy(of, of + N, y);
  return sum;
}

// Computes row i of y and stats.
template <typename T, typename P>
void forward(const Filtering<T, P>& s, int64_t plane, int64_t i, T* tile, T* buffer) {
  using V = at::vec::Vectorized<T>;
  const Strides& of = s.of_filters;
  const P* filters = s.filters + plane / s.G * of.b + plane % s.G * of.g + i * of.h;
  for (int64_t start = 0; start < s.W; start += COLUMNS) {
    const int64_t width = std::min(COLUMNS, s.W - start);
    read(filters + start * of.w, of, s.K(), width, tile, buffer);
    each<V>(width, [&](int64_t j, auto count) {
      V minus_m(0), sum(0);
      prefetch<0>(filters + start * of.w + of.h, of, s.K(), width, j / V::size(), (width + V::size() - 1) / V::size());
      if (s.stats) {
        minus_m = largest(tile + j, s.K()) * V(static_cast<T>(-LOG2E));
      }
      by_channels(s.C, [&](int64_t c, auto n) {
        V y[n];
        const T* window = s.x + (plane * s.C + c) * s.x_plane() + i * s.x_width() + start + j;
        if (s.stats && c == 0) {
          sum = filter<n, true>(s, window, tile + j, minus_m, y, s.C > n, count);
        } else {
          filter<n, false>(s, window, tile + j, minus_m, y, false, count);
        }
        for (int a = 0; a < n; ++a) {
          T* to = s.y + ((plane * s.C + c + a) * s.H + i) * s.W + start + j;
          (s.stats ? y[a] / sum : y[a]).store(to, count);
        }
      });
      if (s.stats) {
        T* to = s.stats + (plane * s.H + i) * s.W + start + j;
        minus_m.store(to, count);
        sum.store(to + s.B * s.G * s.H * s.W, count);
      }
    });
  }
}

// Buffers of the backward pass of a tile: e (Kw, wide) and the gradient of y divided by s (C, wide), with zeros on both
// sides, so that the gradient of a pixel of x from a row of taps is a sum over v; centre, the term that all taps share.
template <typename T>
struct Scratch {
  using V = at::vec::Vectorized<T>;
  int64_t margin, wide, filled = 0;
  std::vector<T> tile, buffer, room, e, grad, centre;

  template <typename P>
  explicit Scratch(const Filtering<T, P>& s)
      : margin(s.Kw - 1),
        wide(COLUMNS + 2 * margin + V::size()),
        tile(s.K() * ROW),
        buffer(s.K() * V::size()),
        room(std::max<int64_t>(s.K() * V::size(), COLUMNS)),
        e(s.Kw * wide),
        grad(s.C * wide),
        centre(COLUMNS) {}
};

template <typename T, typename P>
void begin(const Filtering<T, P>& s, Scratch<T>& scratch, int64_t plane, int64_t at, int64_t width) {
  using V = at::vec::Vectorized<T>;
  if (width < scratch.filled) {  // a wider tile overwrites all old values
    std::fill(scratch.e.begin(), scratch.e.end(), 0);
    std::fill(scratch.grad.begin(), scratch.grad.end(), 0);
  }
  scratch.filled = width;
  each<V>(width, [&](int64_t j, auto count) {
    const int64_t size = s.H * s.W, planes = s.B * s.G;
    const V sum = s.stats ? load(s.stats + (planes + plane) * size + at + j, count) : V(1);
    V common(0);
    for (int64_t c = 0; c < s.C; ++c) {
      const int64_t pixel = (plane * s.C + c) * size + at + j;
      const V to = load(s.grad_y + pixel, count) / sum;
      to.store(scratch.grad.data() + c * scratch.wide + scratch.margin + j, count);
      common = s.stats ? common - to * load(s.y + pixel, count) : common;
    }
    common.store(scratch.centre.data() + j, count);
  });
}

// Computes e for a row of taps and overwrites the logits by their gradients; N channels, or any number if N is 0.
template <int N, bool SOFTMAX, typename T>
void taps_backward(
    const T* window, int64_t plane, const T* minus_m, const T* grad, const T* centre, T* taps, T* e, int64_t wide,
    int64_t width, int64_t Kw, int64_t channels) {
  using V = at::vec::Vectorized<T>;
  each<V>(width, [&](int64_t j, auto count) {
    const V shift = SOFTMAX ? load(minus_m + j, count) : V(0), common = load(centre + j);
    V to_y[N + 1];
    for (int c = 0; c < N; ++c) {
      to_y[c] = load(grad + c * wide + j);
    }
    for (int64_t v = 0; v < Kw; ++v) {
      T* tap = taps + v * ROW + j;
      V power = load(tap), to = common;
      if constexpr (SOFTMAX) {
        power = exp2(at::vec::fmadd(power, V(static_cast<T>(LOG2E)), shift));
      }
      power.store(e + v * wide + j, count);
      for (int64_t c = 0; c < (N ? N : channels); ++c) {
        to = at::vec::fmadd(N ? to_y[c] : load(grad + c * wide + j), load(window + c * plane + v + j, count), to);
      }
      (SOFTMAX ? to * power : to).store(tap);
    }
  });
}

// Adds the gradients of a row of N channels of x: each pixel sums over the output pixels to its left that read it.
template <int N, typename T>
void row_backward(const T* e, const T* grad, int64_t wide, int64_t width, int64_t Kw, T* to_x, int64_t plane) {
  using V = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < width; j += V::size()) {
    V sum[N];
    for (int a = 0; a < N; ++a) {
      sum[a] = load(to_x + a * plane + j);
    }
    for (int64_t v = 0; v < Kw; ++v) {
      const V power = load(e + v * wide + j - v);
      for (int a = 0; a < N; ++a) {
        sum[a] = at::vec::fmadd(power, load(grad + a * wide + j - v), sum[a]);
      }
    }
    for (int a = 0; a < N; ++a) {
      sum[a].store(to_x + a * plane + j);
    }
  }
}

// Computes row i of grad_filters and adds its contribution to grad_x.
template <typename T, typename P>
void backward(const Filtering<T, P>& s, int64_t plane, int64_t i, T* to_x, Scratch<T>& scratch) {
  const Strides &of = s.of_filters, &to = s.of_gradient;
  const int64_t b = plane / s.G, g = plane % s.G, wide = scratch.wide;
  T *tile = scratch.tile.data(), *e = scratch.e.data() + scratch.margin, *grad = scratch.grad.data() + scratch.margin;
  for (int64_t start = 0; start < s.W; start += COLUMNS) {
    const int64_t width = std::min(COLUMNS, s.W - start), at = i * s.W + start;
    const P* filters = s.filters + b * of.b + g * of.g + i * of.h + start * of.w;
    read(filters, of, s.K(), width, tile, scratch.buffer.data());
    begin(s, scratch, plane, at, width);
    P* gradient = s.grad_filters ? s.grad_filters + b * to.b + g * to.g + i * to.h + start * to.w : nullptr;
    for (int64_t u = 0; u < s.Kh; ++u) {
      prefetch<0>(filters + of.h, of, s.K(), width, u, s.Kh);
      const auto taps = [&](auto f, const T* minus_m) {
        const T* window = s.x + plane * s.C * s.x_plane() + (i + u) * s.x_width() + start;
        f(window, s.x_plane(), minus_m, grad, scratch.centre.data(), tile + u * s.Kw * ROW, e, wide, width, s.Kw, s.C);
      };
      by_channels(std::min<int64_t>(s.C, 4), [&](int64_t, auto n) {
        constexpr int N = n < 4 ? n : 0;
        s.stats ? taps(taps_backward<N, true, T>, s.stats + plane * s.H * s.W + at)
                : taps(taps_backward<N, false, T>, nullptr);
      });
      by_channels(to_x ? s.C : 0, [&](int64_t c, auto n) {
        const int64_t size = (s.rows + s.Kh - 1) * s.row_size;
        T* row = to_x + c * size + u * s.row_size + start;
        row_backward<n>(e, grad + c * wide, wide, width + s.Kw - 1, s.Kw, row, size);
      });
    }
    if (gradient) {
      write(tile, s.K(), width, gradient, to, scratch.buffer.data(), reinterpret_cast<P*>(scratch.room.data()));
    }
  }
}

template <typename T, typename P>
void local_filter(const Filtering<T, P>& s) {
  at::parallel_for(0, s.B * s.G * s.H, 1, [&](int64_t row, int64_t end) {
    std::vector<T> tile(s.K() * ROW), buffer(s.K() * at::vec::Vectorized<T>::size());
    for (; row < end; ++row) {
      forward(s, row / s.H, row % s.H, tile.data(), buffer.data());
    }
  });
}

template <typename T, typename P>
void local_filter_backward(const Filtering<T, P>& s) {
  const int64_t parts = (s.H + s.rows - 1) / s.rows, planes = s.B * s.G;
  at::parallel_for(0, parts * planes, 1, [&](int64_t unit, int64_t end) {
    Scratch<T> scratch(s);
    for (; unit < end; ++unit) {
      const int64_t plane = unit / parts, first = unit % parts * s.rows, size = s.C * (s.rows + s.Kh - 1) * s.row_size;
      T* to_x = s.grad_x ? s.grad_x + (unit % parts * planes + plane) * size : nullptr;
      for (int64_t i = first; i < std::min(s.H, first + s.rows); ++i) {
        backward(s, plane, i, to_x ? to_x + (i - first) * s.row_size : nullptr, scratch);
      }
    }
#ifdef __AVX2__
    _mm_sfence();  // makes streamed stores visible to other threads
#endif
  });
}

}  // namespace

#define EXPORT(name, T, P)                                                                                            \
  extern "C" __attribute__((visibility("default"))) void forward_##name(const Filtering<T, P>* s) {                   \
    local_filter(*s);                                                                                                 \
  }                                                                                                                   \
  extern "C" __attribute__((visibility("default"))) void backward_##name(const Filtering<T, P>* s) {                  \
    local_filter_backward(*s);                                                                                        \
  }

EXPORT(float32_float32, float, float)
EXPORT(float32_bfloat16, float, c10::BFloat16)
EXPORT(float64_float64, double, double)
