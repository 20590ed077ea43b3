// The AVX-512 intrinsics that the kernels use, computed with AVX2: so that their AVX-512 variants
// run, lane for lane, on machines without it.
//
// Built in by VLMFAST_EMULATE_AVX512 (see tests/tools/emulation.py). Loads and stores under a mask
// touch no byte that the mask leaves out, and are plain code, which sanitizers can watch. What the
// instructions do with NaN, infinities, subnormals and roundings is done here, too, after Intel's
// "Architectures Software Developer's Manual". Nothing here is meant to be fast.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC target("avx2,fma,f16c")
#pragma GCC push_options
#pragma GCC optimize("O3")

// Called, not inlined: kernels unroll them by the hundred, and would take minutes to compile.
#define VLMFAST_EMULATED __attribute__((noinline)) inline

namespace vlmfast::emulation {

// A register of 512 bits as arrays that can be indexed.
template <class Lane>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(Lane);
  Lane lane[kCount];
};

template <class Lane, class Register>
inline Lanes<Lane> lanes_of(Register x) {
  static_assert(sizeof(Register) == 64);
  Lanes<Lane> result;
  std::memcpy(&result, &x, 64);
  return result;
}

template <class Register, class Lane>
inline Register register_of(const Lanes<Lane>& x) {
  static_assert(sizeof(Register) == 64);
  Register result;
  std::memcpy(&result, &x, 64);
  return result;
}

// Applies an operation on 256 bits to both halves.
template <class Half, class Register, class Operation, class... Registers>
inline Register by_halves(Operation operation, Register first, Registers... others) {
  struct Halves {
    Half low, high;
  };
  const auto halves = [](auto x) {
    Halves result;
    static_assert(sizeof x == sizeof result);
    std::memcpy(&result, &x, sizeof x);
    return result;
  };
  const Halves result = {operation(halves(first).low, halves(others).low...),
                         operation(halves(first).high, halves(others).high...)};
  Register joined;
  std::memcpy(&joined, &result, sizeof joined);
  return joined;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The bfloat16 instructions take subnormal numbers for zero, and make none.
inline float flushed(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7f800000) == 0 ? float_of(bits & 0x80000000) : x;
}

inline uint16_t to_bf16(float x) {
  if (x != x) return static_cast<uint16_t>(bits_of(x) >> 16 | 0x40);
  const uint32_t bits = bits_of(flushed(x));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// --- floats ---

inline __m512 set1_ps(float x) {
  Lanes<float> r;
  for (float& lane : r.lane) lane = x;
  return register_of<__m512>(r);
}
inline __m512 loadu_ps(const void* p) {
  __m512 x;
  std::memcpy(&x, p, 64);
  return x;
}
inline void storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, 64); }
VLMFAST_EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const float* p) {
  Lanes<float> r;
  for (int i = 0; i < 16; i++) r.lane[i] = mask >> i & 1 ? p[i] : 0.f;
  return register_of<__m512>(r);
}
VLMFAST_EMULATED void mask_storeu_ps(float* p, __mmask16 mask, __m512 x) {
  const auto r = lanes_of<float>(x);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) p[i] = r.lane[i];
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>([](auto x, auto y, auto z) { return _mm256_fmadd_ps(x, y, z); }, a, b,
                           c);
}
inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>([](auto x, auto y, auto z) { return _mm256_fmsub_ps(x, y, z); }, a, b,
                           c);
}
VLMFAST_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  return by_halves<__m256>([](auto x, auto y) { return _mm256_max_ps(x, y); }, a, b);
}
VLMFAST_EMULATED __m512 min_ps(__m512 a, __m512 b) {
  return by_halves<__m256>([](auto x, auto y) { return _mm256_min_ps(x, y); }, a, b);
}
VLMFAST_EMULATED __m512 sqrt_ps(__m512 x) {
  return by_halves<__m256>([](auto y) { return _mm256_sqrt_ps(y); }, x);
}
// Halves are combined with halves, down to one lane, as GCC expands the real ones.
template <class Operation>
VLMFAST_EMULATED float reduce(__m512 x, Operation operation) {
  auto r = lanes_of<float>(x);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) r.lane[i] = operation(r.lane[i], r.lane[i + width]);
  return r.lane[0];
}
VLMFAST_EMULATED float reduce_add_ps(__m512 x) {
  return reduce(x, [](float a, float b) { return a + b; });
}
VLMFAST_EMULATED float reduce_max_ps(__m512 x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
// What rounding to an integer takes away: x - round(x); nothing of an infinity.
template <int kControl>
VLMFAST_EMULATED __m512 reduce_ps(__m512 x) {
  static_assert(kControl == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return by_halves<__m256>(
      [](__m256 y) {
        const __m256 rest = _mm256_sub_ps(y, _mm256_round_ps(y, kControl));
        const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.f), y);
        const __m256 infinite =
            _mm256_cmp_ps(magnitude, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
        return _mm256_andnot_ps(infinite, rest);
      },
      x);
}
// a * 2^floor(b), rounded once: in float64 the product is exact.
inline float scale_by(float a, float b) {
  if (b != b || a != a) return a + b;
  if (b == __builtin_inff()) return a == 0.f ? __builtin_nanf("") : a * __builtin_inff();
  if (b == -__builtin_inff()) return a - a == 0.f ? a * 0.f : __builtin_nanf("");
  const float most = 512.f;  // beyond that everything has become zero or infinite
  const float clamped = b < -most ? -most : b > most ? most : b;
  const uint64_t bits = static_cast<uint64_t>(1023 + static_cast<int>(__builtin_floorf(clamped)))
                        << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return static_cast<float>(static_cast<double>(a) * power);
}
VLMFAST_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {
  auto r = lanes_of<float>(a);
  const auto exponents = lanes_of<float>(b);
  for (int i = 0; i < 16; i++) r.lane[i] = scale_by(r.lane[i], exponents.lane[i]);
  return register_of<__m512>(r);
}
template <int kPredicate>
VLMFAST_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  const auto compared = lanes_of<uint32_t>(
      by_halves<__m256>([](auto x, auto y) { return _mm256_cmp_ps(x, y, kPredicate); }, a, b));
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= (compared.lane[i] & 1) << i;
  return static_cast<__mmask16>(mask);
}
template <class Register>
VLMFAST_EMULATED Register mask_blend(__mmask16 mask, Register no, Register yes) {
  auto r = lanes_of<uint32_t>(no);
  const auto chosen = lanes_of<uint32_t>(yes);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) r.lane[i] = chosen.lane[i];
  return register_of<Register>(r);
}

// --- order of lanes ---

VLMFAST_EMULATED __m512 unpacklo_ps(__m512 a, __m512 b) {
  return by_halves<__m256>([](auto x, auto y) { return _mm256_unpacklo_ps(x, y); }, a, b);
}
VLMFAST_EMULATED __m512 unpackhi_ps(__m512 a, __m512 b) {
  return by_halves<__m256>([](auto x, auto y) { return _mm256_unpackhi_ps(x, y); }, a, b);
}
VLMFAST_EMULATED __m512d unpacklo_pd(__m512d a, __m512d b) {
  return by_halves<__m256d>([](auto x, auto y) { return _mm256_unpacklo_pd(x, y); }, a, b);
}
VLMFAST_EMULATED __m512d unpackhi_pd(__m512d a, __m512d b) {
  return by_halves<__m256d>([](auto x, auto y) { return _mm256_unpackhi_pd(x, y); }, a, b);
}
// Two of the four quarters of a, then two of b.
VLMFAST_EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  const auto first = lanes_of<float>(a), second = lanes_of<float>(b);
  Lanes<float> r;
  for (int quarter = 0; quarter < 4; quarter++) {
    const float* from = (quarter < 2 ? first : second).lane + 4 * (control >> (2 * quarter) & 3);
    std::memcpy(r.lane + 4 * quarter, from, 16);
  }
  return register_of<__m512>(r);
}
VLMFAST_EMULATED __m512i permutexvar_epi16(__m512i order, __m512i x) {
  const auto from = lanes_of<uint16_t>(order), source = lanes_of<uint16_t>(x);
  Lanes<uint16_t> r;
  for (int i = 0; i < 32; i++) r.lane[i] = source.lane[from.lane[i] & 31];
  return register_of<__m512i>(r);
}
VLMFAST_EMULATED __m512i castsi256_si512(__m256i x) {
  Lanes<uint64_t> r = {};
  std::memcpy(&r, &x, 32);
  return register_of<__m512i>(r);
}
VLMFAST_EMULATED __m512i inserti64x4(__m512i x, __m256i half, int at) {
  auto r = lanes_of<uint64_t>(x);
  std::memcpy(r.lane + 4 * at, &half, 32);
  return register_of<__m512i>(r);
}

// --- integers ---

VLMFAST_EMULATED __m512i set1_epi32(int32_t x) {
  Lanes<int32_t> r;
  for (int32_t& lane : r.lane) lane = x;
  return register_of<__m512i>(r);
}
template <class... Ints>
VLMFAST_EMULATED __m512i setr_epi32(Ints... x) {
  return register_of<__m512i>(Lanes<int32_t>{{static_cast<int32_t>(x)...}});
}
template <class... Ints>
VLMFAST_EMULATED __m512i set_epi16(Ints... x) {
  static_assert(sizeof...(Ints) == 32);
  const int16_t last_first[] = {static_cast<int16_t>(x)...};
  Lanes<int16_t> r;
  for (int i = 0; i < 32; i++) r.lane[i] = last_first[31 - i];
  return register_of<__m512i>(r);
}
VLMFAST_EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_add_epi32(x, y); }, a, b);
}
VLMFAST_EMULATED __m512i and_si512(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_and_si256(x, y); }, a, b);
}
VLMFAST_EMULATED __m512i xor_si512(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_xor_si256(x, y); }, a, b);
}
VLMFAST_EMULATED __m512i srli_epi32(__m512i x, int count) {
  return by_halves<__m256i>([count](auto y) { return _mm256_srli_epi32(y, count); }, x);
}
VLMFAST_EMULATED __m512i slli_epi32(__m512i x, int count) {
  return by_halves<__m256i>([count](auto y) { return _mm256_slli_epi32(y, count); }, x);
}
VLMFAST_EMULATED __mmask16 cmpge_epi32_mask(__m512i a, __m512i b) {
  const auto x = lanes_of<int32_t>(a), y = lanes_of<int32_t>(b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(x.lane[i] >= y.lane[i]) << i;
  return static_cast<__mmask16>(mask);
}

// --- 16-bit numbers ---

VLMFAST_EMULATED __m512i maskz_loadu_epi16(__mmask32 mask, const void* p) {
  Lanes<uint16_t> r;
  for (int i = 0; i < 32; i++)
    r.lane[i] = mask >> i & 1 ? static_cast<const uint16_t*>(p)[i] : uint16_t{0};
  return register_of<__m512i>(r);
}
VLMFAST_EMULATED __m256i half_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  uint16_t r[16];
  for (int i = 0; i < 16; i++)
    r[i] = mask >> i & 1 ? static_cast<const uint16_t*>(p)[i] : uint16_t{0};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
VLMFAST_EMULATED void half_mask_storeu_epi16(void* p, __mmask16 mask, __m256i x) {
  uint16_t r[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(r), x);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = r[i];
}
VLMFAST_EMULATED __m512i cvtepu16_epi32(__m256i x) {
  uint16_t from[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(from), x);
  Lanes<uint32_t> r;
  for (int i = 0; i < 16; i++) r.lane[i] = from[i];
  return register_of<__m512i>(r);
}
VLMFAST_EMULATED __m256i cvtepi32_epi16(__m512i x) {
  const auto from = lanes_of<uint32_t>(x);
  uint16_t r[16];
  for (int i = 0; i < 16; i++) r[i] = static_cast<uint16_t>(from.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
VLMFAST_EMULATED __m512 cvtph_ps(__m256i x) {
  __m128i half[2];
  std::memcpy(half, &x, 32);
  const __m256 r[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return loadu_ps(r);
}
template <int kRounding>
VLMFAST_EMULATED __m256i cvtps_ph(__m512 x) {
  __m256 half[2];
  std::memcpy(half, &x, 64);
  const __m128i r[2] = {_mm256_cvtps_ph(half[0], kRounding), _mm256_cvtps_ph(half[1], kRounding)};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
VLMFAST_EMULATED __m256i cvtneps_pbh(__m512 x) {
  const auto from = lanes_of<float>(x);
  uint16_t r[16];
  for (int i = 0; i < 16; i++) r[i] = to_bf16(from.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
// The lanes of `low`, then those of `high`.
VLMFAST_EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto first = lanes_of<float>(low), second = lanes_of<float>(high);
  Lanes<uint16_t> r;
  for (int i = 0; i < 16; i++) {
    r.lane[i] = to_bf16(first.lane[i]);
    r.lane[16 + i] = to_bf16(second.lane[i]);
  }
  return register_of<__m512i>(r);
}
// Two products a lane, the second of each pair added first.
VLMFAST_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  auto r = lanes_of<float>(sum);
  const auto x = lanes_of<uint16_t>(a), y = lanes_of<uint16_t>(b);
  for (int i = 0; i < 16; i++)
    for (int j = 2 * i + 1; j >= 2 * i; j--)
      r.lane[i] = flushed(__builtin_fmaf(flushed(from_bf16(x.lane[j])),
                                         flushed(from_bf16(y.lane[j])), flushed(r.lane[i])));
  return register_of<__m512>(r);
}

}  // namespace vlmfast::emulation

#pragma GCC pop_options

#define _mm512_setzero_ps() ::vlmfast::emulation::set1_ps(0.f)
#define _mm512_set1_ps(...) ::vlmfast::emulation::set1_ps(__VA_ARGS__)
#define _mm512_loadu_ps(...) ::vlmfast::emulation::loadu_ps(__VA_ARGS__)
#define _mm512_storeu_ps(...) ::vlmfast::emulation::storeu_ps(__VA_ARGS__)
#define _mm512_maskz_loadu_ps(...) ::vlmfast::emulation::maskz_loadu_ps(__VA_ARGS__)
#define _mm512_mask_storeu_ps(...) ::vlmfast::emulation::mask_storeu_ps(__VA_ARGS__)
#define _mm512_fmadd_ps(...) ::vlmfast::emulation::fmadd_ps(__VA_ARGS__)
#define _mm512_fmsub_ps(...) ::vlmfast::emulation::fmsub_ps(__VA_ARGS__)
#define _mm512_max_ps(...) ::vlmfast::emulation::max_ps(__VA_ARGS__)
#define _mm512_min_ps(...) ::vlmfast::emulation::min_ps(__VA_ARGS__)
#define _mm512_sqrt_ps(...) ::vlmfast::emulation::sqrt_ps(__VA_ARGS__)
#define _mm512_reduce_add_ps(...) ::vlmfast::emulation::reduce_add_ps(__VA_ARGS__)
#define _mm512_reduce_max_ps(...) ::vlmfast::emulation::reduce_max_ps(__VA_ARGS__)
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, control) ::vlmfast::emulation::reduce_ps<(control)>(x)
#define _mm512_scalef_ps(...) ::vlmfast::emulation::scalef_ps(__VA_ARGS__)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) ::vlmfast::emulation::cmp_ps_mask<(predicate)>(a, b)
#define _mm512_mask_blend_ps(...) ::vlmfast::emulation::mask_blend<__m512>(__VA_ARGS__)
#define _mm512_mask_blend_epi32(...) ::vlmfast::emulation::mask_blend<__m512i>(__VA_ARGS__)
#define _mm512_unpacklo_ps(...) ::vlmfast::emulation::unpacklo_ps(__VA_ARGS__)
#define _mm512_unpackhi_ps(...) ::vlmfast::emulation::unpackhi_ps(__VA_ARGS__)
#define _mm512_unpacklo_pd(...) ::vlmfast::emulation::unpacklo_pd(__VA_ARGS__)
#define _mm512_unpackhi_pd(...) ::vlmfast::emulation::unpackhi_pd(__VA_ARGS__)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(...) ::vlmfast::emulation::shuffle_f32x4(__VA_ARGS__)
#define _mm512_permutexvar_epi16(...) ::vlmfast::emulation::permutexvar_epi16(__VA_ARGS__)
#define _mm512_castsi256_si512(...) ::vlmfast::emulation::castsi256_si512(__VA_ARGS__)
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(...) ::vlmfast::emulation::inserti64x4(__VA_ARGS__)
#define _mm512_castps_pd(x) ((__m512d)(x))
#define _mm512_castpd_ps(x) ((__m512)(x))
#define _mm512_castps_si512(x) ((__m512i)(x))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_set1_epi32(...) ::vlmfast::emulation::set1_epi32(__VA_ARGS__)
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) ::vlmfast::emulation::setr_epi32(__VA_ARGS__)
#define _mm512_set_epi16(...) ::vlmfast::emulation::set_epi16(__VA_ARGS__)
#define _mm512_add_epi32(...) ::vlmfast::emulation::add_epi32(__VA_ARGS__)
#define _mm512_and_si512(...) ::vlmfast::emulation::and_si512(__VA_ARGS__)
#define _mm512_xor_si512(...) ::vlmfast::emulation::xor_si512(__VA_ARGS__)
#undef _mm512_srli_epi32
#define _mm512_srli_epi32(...) ::vlmfast::emulation::srli_epi32(__VA_ARGS__)
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(...) ::vlmfast::emulation::slli_epi32(__VA_ARGS__)
#undef _mm512_cmpge_epi32_mask
#define _mm512_cmpge_epi32_mask(...) ::vlmfast::emulation::cmpge_epi32_mask(__VA_ARGS__)
#define _mm512_maskz_loadu_epi16(...) ::vlmfast::emulation::maskz_loadu_epi16(__VA_ARGS__)
#define _mm256_maskz_loadu_epi16(...) ::vlmfast::emulation::half_maskz_loadu_epi16(__VA_ARGS__)
#define _mm256_mask_storeu_epi16(...) ::vlmfast::emulation::half_mask_storeu_epi16(__VA_ARGS__)
#define _mm512_cvtepu16_epi32(...) ::vlmfast::emulation::cvtepu16_epi32(__VA_ARGS__)
#define _mm512_cvtepi32_epi16(...) ::vlmfast::emulation::cvtepi32_epi16(__VA_ARGS__)
#define _mm512_cvtph_ps(...) ::vlmfast::emulation::cvtph_ps(__VA_ARGS__)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) ::vlmfast::emulation::cvtps_ph<(rounding)>(x)
#define _mm512_cvtneps_pbh(...) ::vlmfast::emulation::cvtneps_pbh(__VA_ARGS__)
#define _mm512_cvtne2ps_pbh(...) ::vlmfast::emulation::cvtne2ps_pbh(__VA_ARGS__)
#define _mm512_dpbf16_ps(...) ::vlmfast::emulation::dpbf16_ps(__VA_ARGS__)
