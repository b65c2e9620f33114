// What HyperLSTMCell does in a step beside its large products, in one pass over memory: hyper_lstm.py's _step and
// _step_backward, which say the same in PyTorch. fused.py builds and calls it.
//
// Letters as in hyper_lstm.py; n samples take part in the step. R samples go side by side, so that a row of the scales is
// read once for all of them. x and products are of type P, all else of type T.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr double EPSILON = 1e-3;  // of every layer norm, as in hyper_lstm.py

template <typename T, typename P>
struct Step {
  T *kept_h, *kept_c, *gates, *tanh_c, *normal, *rstd;  // _Kept
  const P *x, *products;  // (n, 4H), row_size from one sample to the next
  const T* z;  // (n, 12 Z), or the small network's own sums (n, 4H)
  const T *scale, *norm, *mask;  // (12, Z, H), none in the small network; (2, 5, H); (n, H)
  T *h, *c, *out;  // state and output (n, H); backward: their gradients
  P *to_x, *to_products;  // backward alone, like all that follows
  T *to_z, *grad_norm, *grad_scale;  // the last two: one for each part of the samples
  int64_t n, H, Z, row_size, parts;

  T* row(T* slab, int64_t gate, int64_t b) const {
    return slab + (gate * n + b) * H;
  }
};

// f(h, count) for each vector of a row; only the last may have a count below a vector's size.
template <typename V, typename F>
inline void each(int64_t H, F f) {
  int64_t h = 0;
  for (; h + V::size() <= H; h += V::size()) {
    f(h, std::integral_constant<int, V::size()>());
  }
  if (h < H) {
    f(h, static_cast<int>(H - h));
  }
}

template <typename V, typename P>
inline V load(const P* from, int count) {
  if constexpr (std::is_same_v<P, typename V::value_type>) {
    return count == V::size() ? V::loadu(from) : V::loadu(from, count);
  } else {
    typename V::value_type wide[V::size()] = {};
    std::copy(from, from + count, wide);
    return V::loadu(wide);
  }
}

template <typename V, typename P>
inline void store(V values, P* to, int count) {
  if constexpr (std::is_same_v<P, typename V::value_type>) {
    values.store(to, count);
  } else {
    typename V::value_type wide[V::size()];
    values.store(wide);
    std::copy(wide, wide + count, to);
  }
}

template <typename V>
inline auto total(V values) {
  return at::vec::vec_reduce_all<typename V::value_type>([](V a, V b) { return a + b; }, values);
}

template <typename V>
inline V sigmoid(V x) {
  return (V(1) + x.neg().exp()).reciprocal();
}

// Layer norm k (of the gates or c) of one row, in place; what it was before gain and bias, and by what, is kept.
template <typename T, typename P>
void normalise(const Step<T, P>& s, int64_t k, int64_t b, T* x) {
  using V = at::vec::Vectorized<T>;
  V sum(0), squares(0);
  each<V>(s.H, [&](int64_t h, auto count) { sum += load<V>(x + h, count); });
  const V mean(total(sum) / s.H);
  each<V>(s.H, [&](int64_t h, auto count) {
    const V away = V::set(V(0), load<V>(x + h, count) - mean, count);
    squares = at::vec::fmadd(away, away, squares);
  });
  const T rstd = s.rstd[k * s.n + b] = 1 / std::sqrt(total(squares) / s.H + static_cast<T>(EPSILON));
  const T *gain = s.norm + k * s.H, *bias = gain + 5 * s.H;
  T* normal = s.row(s.normal, k, b);
  each<V>(s.H, [&](int64_t h, auto count) {
    const V found = (load<V>(x + h, count) - mean) * V(rstd);
    store(found, normal + h, count);
    store(at::vec::fmadd(found, load<V>(gain + h, count), load<V>(bias + h, count)), x + h, count);
  });
}

// From the gradient of the result to that of what was normalised, in place.
template <typename T, typename P>
void normalise_backward(const Step<T, P>& s, int64_t k, int64_t b, int64_t part, T* grad) {
  using V = at::vec::Vectorized<T>;
  const T *gain = s.norm + k * s.H, *normal = s.row(s.normal, k, b);
  T *grad_gain = s.grad_norm + (part * 10 + k) * s.H, *grad_bias = grad_gain + 5 * s.H;
  V sum(0), products(0);
  each<V>(s.H, [&](int64_t h, auto count) {
    const V y = load<V>(normal + h, count);
    V to = load<V>(grad + h, count);
    store(at::vec::fmadd(to, y, load<V>(grad_gain + h, count)), grad_gain + h, count);
    store(to + load<V>(grad_bias + h, count), grad_bias + h, count);
    to = to * load<V>(gain + h, count);
    store(to, grad + h, count);
    sum += to;
    products = at::vec::fmadd(to, y, products);
  });
  const V mean(total(sum) / s.H), slope(total(products) / s.H), rstd(s.rstd[k * s.n + b]);
  each<V>(s.H, [&](int64_t h, auto count) {
    store((load<V>(grad + h, count) - mean - load<V>(normal + h, count) * slope) * rstd, grad + h, count);
  });
}

// Scales k of R samples from b on, at one vector of units. The last row of d_h and of d_x is always 0, of b it is b_0.
template <int R, typename V, typename T, typename P, typename C>
inline void scales(const Step<T, P>& s, int64_t k, int64_t b, int64_t h, C count, V (&d)[R]) {
  const T *z = s.z + (b * 12 + k) * s.Z, *scale = s.scale + k * s.Z * s.H + h;
  std::fill(d, d + R, V(0));
  for (int64_t i = 0, used = k < 8 ? s.Z - 1 : s.Z; i < used; ++i) {
    const V row = load<V>(scale + i * s.H, count);
    for (int r = 0; r < R; ++r) {
      d[r] = at::vec::fmadd(row, V(z[r * 12 * s.Z + i]), d[r]);
    }
  }
}

template <int R, typename T, typename P>
void forward(const Step<T, P>& s, int64_t b) {
  using V = at::vec::Vectorized<T>;
  for (int64_t y = 0; y < 4; ++y) {
    each<V>(s.H, [&](int64_t h, auto count) {
      const auto at = [&](const P* from, int r) { return load<V>(from + (b + r) * s.row_size + y * s.H + h, count); };
      V sum[R], d[R];
      if (s.scale) {
        scales(s, 8 + y, b, h, count, sum);
        for (const auto& [kind, factor] : {std::pair(0, s.products), std::pair(4, s.x)}) {
          scales(s, kind + y, b, h, count, d);
          for (int r = 0; r < R; ++r) {
            sum[r] = at::vec::fmadd(d[r], at(factor, r), sum[r]);
          }
        }
      } else {
        for (int r = 0; r < R; ++r) {
          sum[r] = load<V>(s.z + ((b + r) * 4 + y) * s.H + h, count) + at(s.x, r) + at(s.products, r);
        }
      }
      for (int r = 0; r < R; ++r) {
        store(sum[r], s.row(s.gates, y, b + r) + h, count);
      }
    });
  }
  for (int64_t end = b + R; b < end; ++b) {
    T *i = s.row(s.gates, 0, b), *f = s.row(s.gates, 1, b), *g = s.row(s.gates, 2, b), *o = s.row(s.gates, 3, b);
    T* tanh_c = s.row(s.tanh_c, 0, b);
    const auto row = [&](auto* slab) { return slab + b * s.H; };
    for (int64_t k = 0; s.norm && k < 4; ++k) {
      normalise(s, k, b, s.row(s.gates, k, b));
    }
    each<V>(s.H, [&](int64_t h, auto count) {
      const V in = sigmoid(load<V>(i + h, count)), forget = sigmoid(load<V>(f + h, count));
      const V cell = load<V>(g + h, count).tanh(), before = load<V>(row(s.c) + h, count);
      store(in, i + h, count);
      store(forget, f + h, count);
      store(cell, g + h, count);
      store(sigmoid(load<V>(o + h, count)), o + h, count);
      store(before, row(s.kept_c) + h, count);
      const V open = s.mask ? in * load<V>(row(s.mask) + h, count) : in;
      const V after = at::vec::fmadd(open, cell, forget * before);
      store(after, row(s.c) + h, count);
      store(after, tanh_c + h, count);
    });
    if (s.norm) {
      normalise(s, 4, b, tanh_c);
    }
    each<V>(s.H, [&](int64_t h, auto count) {
      store(load<V>(row(s.h) + h, count), row(s.kept_h) + h, count);
      const V to = load<V>(tanh_c + h, count).tanh(), after = to * load<V>(o + h, count);
      store(to, tanh_c + h, count);
      store(after, row(s.h) + h, count);
      store(after, row(s.out) + h, count);
    });
  }
}

// sums (4, R, H) and products (R, H): memory to work in.
template <int R, typename T, typename P>
void backward(const Step<T, P>& s, int64_t first, int64_t part, T* sums, T* products) {
  using V = at::vec::Vectorized<T>;
  for (int r = 0; r < R; ++r) {
    const int64_t b = first + r;
    const T *i = s.row(s.gates, 0, b), *f = s.row(s.gates, 1, b), *g = s.row(s.gates, 2, b), *o = s.row(s.gates, 3, b);
    const auto row = [&](auto* slab) { return slab + b * s.H; };
    const auto to = [&](int gate) { return sums + (gate * R + r) * s.H; };
    each<V>(s.H, [&](int64_t h, auto count) {
      V to_h = load<V>(row(s.h) + h, count);
      if (s.out) {
        to_h += load<V>(row(s.out) + h, count);
      }
      const V tanh_c = load<V>(row(s.tanh_c) + h, count), out = load<V>(o + h, count);
      store(to_h * tanh_c * out * (V(1) - out), to(3) + h, count);
      store(to_h * out * (V(1) - tanh_c * tanh_c), products + h, count);
    });
    if (s.norm) {
      normalise_backward(s, 4, b, part, products);
    }
    each<V>(s.H, [&](int64_t h, auto count) {
      const V to_c = load<V>(row(s.c) + h, count) + load<V>(products + h, count);
      const V in = load<V>(i + h, count), forget = load<V>(f + h, count), cell = load<V>(g + h, count);
      const V masked = s.mask ? to_c * load<V>(row(s.mask) + h, count) : to_c;
      store(masked * cell * in * (V(1) - in), to(0) + h, count);
      store(to_c * load<V>(row(s.kept_c) + h, count) * forget * (V(1) - forget), to(1) + h, count);
      store(masked * in * (V(1) - cell * cell), to(2) + h, count);
      store(to_c * forget, row(s.c) + h, count);
    });
    for (int64_t k = 0; s.norm && k < 4; ++k) {
      normalise_backward(s, k, b, part, to(k));
    }
  }
  for (int64_t y = 0; y < 4; ++y) {
    const T* to_b = sums + y * R * s.H;
    if (!s.scale) {
      for (int64_t r = 0; r < R; ++r) {
        const int64_t at = (first + r) * s.row_size + y * s.H;
        each<V>(s.H, [&](int64_t h, auto count) {
          const V to = load<V>(to_b + r * s.H + h, count);
          store(to, s.to_z + ((first + r) * 4 + y) * s.H + h, count);
          store(to, s.to_x + at + h, count);
          store(to, s.to_products + at + h, count);
        });
      }
      continue;
    }
    for (int64_t kind = 0; kind < 3; ++kind) {
      const int64_t k = 4 * kind + y, used = kind < 2 ? s.Z - 1 : s.Z;
      const T* to_d = to_b;
      if (kind < 2) {
        const P* factor = kind ? s.x : s.products;
        P* to_factor = kind ? s.to_x : s.to_products;
        each<V>(s.H, [&](int64_t h, auto count) {
          V d[R];
          scales(s, k, first, h, count, d);
          for (int64_t r = 0; r < R; ++r) {
            const int64_t at = (first + r) * s.row_size + y * s.H + h;
            const V to = load<V>(to_b + r * s.H + h, count);
            store(to * load<V>(factor + at, count), products + r * s.H + h, count);
            store(to * d[r], to_factor + at, count);
          }
        });
        to_d = products;
      }
      const int64_t at = (first * 12 + k) * s.Z;
      for (int64_t i = 0; i < used; ++i) {
        const T* scale = s.scale + (k * s.Z + i) * s.H;
        T* grad_scale = s.grad_scale + ((part * 12 + k) * s.Z + i) * s.H;
        V sum[R], z[R];
        for (int r = 0; r < R; ++r) {
          sum[r] = V(0);
          z[r] = V(s.z[at + r * 12 * s.Z + i]);
        }
        each<V>(s.H, [&](int64_t h, auto count) {
          const V row = load<V>(scale + h, count);
          V grad = load<V>(grad_scale + h, count);
          for (int r = 0; r < R; ++r) {
            const V to = load<V>(to_d + r * s.H + h, count);
            sum[r] = at::vec::fmadd(row, to, sum[r]);
            grad = at::vec::fmadd(z[r], to, grad);
          }
          store(grad, grad_scale + h, count);
        });
        for (int r = 0; r < R; ++r) {
          s.to_z[at + r * 12 * s.Z + i] = total(sum[r]);
        }
      }
      for (int r = 0; used < s.Z && r < R; ++r) {
        s.to_z[at + r * 12 * s.Z + used] = 0;
      }
    }
  }
}

// f(first sample, how many, part): R samples at a time while there are so many, then one.
template <int R, typename F>
void in_parts(int64_t n, int64_t parts, F f) {
  const int64_t size = ((n + parts - 1) / parts + R - 1) / R * R;
  at::parallel_for(0, parts, 1, [&](int64_t part, int64_t last) {
    for (; part < last; ++part) {
      const int64_t end = std::min(n, (part + 1) * size);
      for (int64_t b = part * size; b < end;) {
        if (b + R <= end) {
          f(b, std::integral_constant<int, R>(), part);
          b += R;
        } else {
          f(b++, std::integral_constant<int, 1>(), part);
        }
      }
    }
  });
}

constexpr int SIDE_BY_SIDE = 8;

template <typename T, typename P>
void step(const Step<T, P>& s) {
  in_parts<SIDE_BY_SIDE>(s.n, s.parts, [&](int64_t b, auto R, int64_t) { forward<R>(s, b); });
}

template <typename T, typename P>
void step_backward(const Step<T, P>& s) {
  in_parts<SIDE_BY_SIDE>(s.n, s.parts, [&](int64_t b, auto R, int64_t part) {
    static thread_local std::vector<T> memory;
    memory.resize(std::max<size_t>(memory.size(), 5 * R * s.H));
    backward<R>(s, b, part, memory.data(), memory.data() + 4 * R * s.H);
  });
}

}  // namespace

#define EXPORT(name, T, P)                                                                                           \
  extern "C" __attribute__((visibility("default"))) void step_##name(const Step<T, P>* s) { step(*s); }              \
  extern "C" __attribute__((visibility("default"))) void step_backward_##name(const Step<T, P>* s) {                 \
    step_backward(*s);                                                                                               \
  }

EXPORT(float32_float32, float, float)
EXPORT(float32_bfloat16, float, c10::BFloat16)
EXPORT(float64_float64, double, double)
