// The part of fused.cu that a C++ compiler needs otherwise: a grid is two loops, and C++'s own
// operators round once where the compiler gets -ffp-contract=off.
#pragma once
#include <cmath>
#include <cstring>

#define DEVICE static inline
#define DEVICE_METHOD inline
#define SHARED static thread_local

struct Index { u32 x; };
static thread_local Index blockIdx, threadIdx;

DEVICE void load_16(u64 address, u32 *words) { memcpy(words, (const void *)address, 16); }
DEVICE void store_16(u64 address, const u32 *words) { memcpy((void *)address, words, 16); }

static inline void atomicMin(i64 *to, i64 value) {
  if (value < *to) *to = value;
}

#define STAGE(name, Arguments) static void name(const Arguments &args)
#define FOR_EACH_THREAD for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
#define KERNEL_OF_STAGES(name, blocks_at_once, Arguments, first, second) \
  extern "C" void name(const Arguments *args, u32 blocks) {              \
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {            \
      FOR_EACH_THREAD first(*args);                                      \
      FOR_EACH_THREAD second(*args);                                     \
    }                                                                    \
  }
#define KERNEL(name, blocks_at_once, Arguments)                          \
  STAGE(name##_thread, Arguments);                                       \
  extern "C" void name(const Arguments *args, u32 blocks) {              \
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)              \
      FOR_EACH_THREAD name##_thread(*args);                              \
  }                                                                      \
  STAGE(name##_thread, Arguments)

template <class To, class From> static inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "only the bits are taken over");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#define OPERATORS(Number)                                                           \
  DEVICE Number operator+(Number a, Number b) { return Number{a.value + b.value}; } \
  DEVICE Number operator-(Number a, Number b) { return Number{a.value - b.value}; } \
  DEVICE Number operator*(Number a, Number b) { return Number{a.value * b.value}; } \
  DEVICE Number operator/(Number a, Number b) { return Number{a.value / b.value}; } \
  DEVICE Number root(Number a) { return Number{std::sqrt(a.value)}; }               \
  DEVICE bool is_finite(Number a) { return std::isfinite(a.value); }
OPERATORS(F32)
OPERATORS(F64)

DEVICE F64 to_double(F32 a) { return F64{(double)a.value}; }
DEVICE F32 to_single(F64 a) { return F32{(float)a.value}; }
DEVICE u32 bits_of(F32 a) { return as<u32>(a.value); }
DEVICE u64 bits_of(F64 a) { return as<u64>(a.value); }
DEVICE F32 single_of(u32 bits) { return F32{as<float>(bits)}; }
DEVICE F64 double_of(u64 bits) { return F64{as<double>(bits)}; }
DEVICE F32 widen_half(u32 bits) { return F32{(float)as<_Float16>((unsigned short)bits)}; }

DEVICE u32 bfloat(F32 a) {
  const u32 bits = bits_of(a), rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return (a.value == a.value ? rounded : 0x7FFF0000u) >> 16;
}
DEVICE u32 half(F32 a) {
  return a.value == a.value ? as<unsigned short>((_Float16)a.value) : 0x7FFFu;
}
DEVICE u32 pair_of_bfloats(F32 low, F32 high) { return bfloat(low) | bfloat(high) << 16; }
DEVICE u32 pair_of_halves(F32 low, F32 high) { return half(low) | half(high) << 16; }
