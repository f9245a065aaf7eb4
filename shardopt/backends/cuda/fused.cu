// The two passes of `Kernel` over a shard, for GPUs. The tests compile the same text as C++, too.
//
// `CudaKernel` compiles it once for each variant that is needed, with these macros:
//   UPDATE    1 for `update`, 0 for `reduce`
//   COMPUTE   dtype in which sums are added up and parameters updated
//   GRAD      dtype of the sources
//   SOURCES   number of sources
//   PARAM     dtype of the parameters, and
//   TARGETS   number of their copies, of an update
//   OUT       dtype of the result of a reduction, or NONE
//   LANES     elements that a thread handles at once: 16 bytes of the narrowest dtype
//   THREADS, CHUNK and COHORTS: threads of a block, elements of a chunk, cohorts of a launch
//
// [Note: accesses of 16 bytes]
// A thread reads and writes LANES neighbours of every array, 16 bytes at a time, as arrays begin on
// multiples of 16 bytes and positions are multiples of LANES. Where a segment begins or ends within
// them, the others are read again and written back as they were.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

struct F32 { float value; };
struct F64 { double value; };

// -- Numbers whose operators round once -----------------------------------------------------------
//
// [Note: every operation rounds once]
// Compilers fuse a * b + c into one operation, and CuPy compiles everything with -ftz=true, which
// flushes subnormal numbers. Operators that name their instruction are left alone by both.

#ifdef __CUDACC__
#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define KERNEL(name, blocks, Arguments)                         \
  extern "C" __global__ void __launch_bounds__(THREADS, blocks) \
  name(const __grid_constant__ Arguments args)
#define SHARED static __shared__
#define STAGE(name, Arguments) DEVICE void name(const Arguments &args)
#define KERNEL_OF_STAGES(name, blocks, Arguments, first, second) \
  KERNEL(name, blocks, Arguments) {                              \
    first(args);                                                 \
    __syncthreads();                                             \
    second(args);                                                \
  }

#define OPERATOR(Number, kind, sign, instruction)                                       \
  DEVICE Number operator sign(Number a, Number b) {                                     \
    Number r;                                                                           \
    asm(instruction " %0, %1, %2;" : "=" kind(r.value) : kind(a.value), kind(b.value)); \
    return r;                                                                           \
  }
#define OPERATORS(Number, kind, type)       \
  OPERATOR(Number, kind, +, "add.rn." type) \
  OPERATOR(Number, kind, -, "sub.rn." type) \
  OPERATOR(Number, kind, *, "mul.rn." type) \
  OPERATOR(Number, kind, /, "div.rn." type)
OPERATORS(F32, "f", "f32")
OPERATORS(F64, "d", "f64")

#define FUNCTION(name, To, to, From, from, instruction)            \
  DEVICE To name(From a) {                                         \
    To r;                                                          \
    asm(instruction " %0, %1;" : "=" to(r.value) : from(a.value)); \
    return r;                                                      \
  }
FUNCTION(root, F32, "f", F32, "f", "sqrt.rn.f32")
FUNCTION(root, F64, "d", F64, "d", "sqrt.rn.f64")
FUNCTION(to_double, F64, "d", F32, "f", "cvt.f64.f32")
FUNCTION(to_single, F32, "f", F64, "d", "cvt.rn.f32.f64")

DEVICE u32 bits_of(F32 a) { return __float_as_uint(a.value); }
DEVICE u64 bits_of(F64 a) { return (u64)__double_as_longlong(a.value); }
DEVICE F32 single_of(u32 bits) { return F32{__uint_as_float(bits)}; }
DEVICE F64 double_of(u64 bits) { return F64{__longlong_as_double((i64)bits)}; }

#define TEST(name, Number, kind, instruction)                                      \
  DEVICE bool name(Number a) {                                                     \
    u32 r;                                                                         \
    asm("{.reg .pred holds; " instruction " holds, %1; selp.u32 %0, 1, 0, holds;}" \
        : "=r"(r) : kind(a.value));                                                \
    return r;                                                                      \
  }
TEST(is_finite, F32, "f", "testp.finite.f32")
TEST(is_finite, F64, "d", "testp.finite.f64")

DEVICE F32 widen_half(u32 bits) {
  F32 r;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
      : "=f"(r.value) : "r"(bits));
  return r;
}

// Two numbers in 32 bits, the first one low: rounded to the nearest, ties to even; NaN stays NaN.
#define PAIR(name, instruction)                                                  \
  DEVICE u32 name(F32 low, F32 high) {                                           \
    u32 r;                                                                       \
    asm(instruction " %0, %1, %2;" : "=r"(r) : "f"(high.value), "f"(low.value)); \
    return r;                                                                    \
  }
PAIR(pair_of_bfloats, "cvt.rn.bf16x2.f32")
PAIR(pair_of_halves, "cvt.rn.f16x2.f32")

// Named as well, as compilers split accesses whose words depend on a condition. Addresses of global
// memory, a peer's and pinned memory of the host included, are the same in its own address space.
DEVICE void load_16(u64 address, u32 *words) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(address));
}

DEVICE void store_16(u64 address, const u32 *words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
#else
#include "fused_on_cpu.h"  // the same for C++, from the tests
#endif

DEVICE F64 to_double(F64 a) { return a; }
DEVICE F32 to_single(F32 a) { return a; }
DEVICE void convert(F32 from, F32 &to) { to = from; }
DEVICE void convert(F64 from, F32 &to) { to = to_single(from); }
DEVICE void convert(F32 from, F64 &to) { to = to_double(from); }
DEVICE void convert(F64 from, F64 &to) { to = from; }

// -- Elements as they are kept, and as they are computed with -------------------------------------

enum Dtype { NONE, BFLOAT16, FLOAT16, FLOAT32, FLOAT64 };

DEVICE constexpr int nbytes(Dtype dtype) {
  return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : dtype == NONE ? 0 : 2;
}

template <Dtype DTYPE> struct NumberOf { typedef F32 Type; };
template <> struct NumberOf<FLOAT64> { typedef F64 Type; };
typedef NumberOf<COMPUTE>::Type Number;

struct Numbers { Number at[LANES]; };

// LANES elements as they are in memory, 32 bits a word; see [Note: accesses of 16 bytes].
template <Dtype DTYPE> struct Elements { u32 words[LANES * nbytes(DTYPE) / 16 * 4]; };

template <Dtype DTYPE> DEVICE Elements<DTYPE> load(u64 array, i64 position) {
  Elements<DTYPE> r;
#pragma unroll
  for (int i = 0; i < LANES * nbytes(DTYPE); i += 16)
    load_16(array + position * nbytes(DTYPE) + i, r.words + i / 4);
  return r;
}

template <Dtype DTYPE> DEVICE void store(u64 array, i64 position, const Elements<DTYPE> &elements) {
#pragma unroll
  for (int i = 0; i < LANES * nbytes(DTYPE); i += 16)
    store_16(array + position * nbytes(DTYPE) + i, elements.words + i / 4);
}

template <Dtype DTYPE> DEVICE Numbers widen(const Elements<DTYPE> &elements) {
  Numbers r;
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    if constexpr (DTYPE == FLOAT64) {
      convert(double_of((u64)elements.words[2 * i + 1] << 32 | elements.words[2 * i]), r.at[i]);
    } else if constexpr (DTYPE == FLOAT32) {
      convert(single_of(elements.words[i]), r.at[i]);
    } else {
      const u32 pair = elements.words[i / 2];
      if constexpr (DTYPE == FLOAT16) {
        convert(widen_half(i % 2 ? pair >> 16 : pair & 0xFFFFu), r.at[i]);
      } else {
        convert(single_of(i % 2 ? pair & 0xFFFF0000u : pair << 16), r.at[i]);
      }
    }
  }
  return r;
}

template <Dtype DTYPE> DEVICE Elements<DTYPE> narrow(const Numbers &numbers) {
  Elements<DTYPE> r;
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    if constexpr (DTYPE == FLOAT64) {
      const u64 bits = bits_of(to_double(numbers.at[i]));
      r.words[2 * i] = (u32)bits;
      r.words[2 * i + 1] = (u32)(bits >> 32);
    } else if constexpr (DTYPE == FLOAT32) {
      r.words[i] = bits_of(to_single(numbers.at[i]));
    } else if (i % 2) {
      const F32 low = to_single(numbers.at[i - 1]), high = to_single(numbers.at[i]);
      r.words[i / 2] = DTYPE == FLOAT16 ? pair_of_halves(low, high) : pair_of_bfloats(low, high);
    }
  }
  return r;
}

// -- The sum of the sources -----------------------------------------------------------------------

DEVICE constexpr int left_half(int count) { return count < 3 ? 1 : 2 * left_half((count + 1) / 2); }

// A pairwise tree in rank order; see [Note: the bits of a sum].
template <int FIRST, int COUNT> struct Tree {
  DEVICE Numbers sum(const u64 *sources, i64 position) {
    constexpr int left = left_half(COUNT);
    Numbers total = Tree<FIRST, left>::sum(sources, position);
    const Numbers more = Tree<FIRST + left, COUNT - left>::sum(sources, position);
#pragma unroll
    for (int i = 0; i < LANES; i++) total.at[i] = total.at[i] + more.at[i];
    return total;
  }
};

template <int FIRST> struct Tree<FIRST, 1> {
  DEVICE Numbers sum(const u64 *sources, i64 position) {
    return widen<GRAD>(load<GRAD>(sources[FIRST], position));
  }
};

// -- Sum and update -------------------------------------------------------------------------------

#if UPDATE

constexpr bool HAS_MASTER = nbytes(PARAM) == 2;

struct Coefficients {  // those of `StepCoefficients`, in its order
  Number source_scale, weight_decay, param_decay, m_decay, m_gain, beta2, v_gain;
  Number g_scale, m_scale, v_scale, eps, mean_scale;
};

struct Segment { i64 start, stop, cohort; };

struct Update {
  u64 sources[SOURCES], targets[TARGETS];  // addresses of position 0
  u64 exp_avg, exp_avg_sq, master;         // likewise
  u64 segments;         // Segment[num_segments]
  u64 first_segments;   // i32[blocks], the first segment that ends behind the start of the chunk
  u64 poisoned;         // i64, lowered to the flat index of a chunk with inf or NaN
  i64 start;            // position of the first chunk
  i64 origin;           // flat index of position 0
  i32 num_segments;
  Coefficients cohorts[COHORTS];  // by value: a copy to the device could make the host wait
};

// Lanes that belong to a segment.
struct Part {
  i32 first, stop;
  DEVICE_METHOD bool is_whole() const { return stop - first == LANES; }
  DEVICE_METHOD bool has(int lane) const { return lane >= first && lane < stop; }
};

// Store the elements that are part of a segment; see [Note: accesses of 16 bytes].
template <Dtype DTYPE>
DEVICE void store_part(u64 array, i64 position, Elements<DTYPE> elements, const Part &part) {
  if (!part.is_whole()) {
    const Elements<DTYPE> old = load<DTYPE>(array, position);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
      if (part.has(i)) continue;
      if constexpr (nbytes(DTYPE) == 2) {
        const u32 mask = i % 2 ? 0xFFFF0000u : 0xFFFFu;
        elements.words[i / 2] = (elements.words[i / 2] & ~mask) | (old.words[i / 2] & mask);
      } else {
        constexpr int count = nbytes(DTYPE) / 4;
#pragma unroll
        for (int k = i * count; k < (i + 1) * count; k++) elements.words[k] = old.words[k];
      }
    }
  }
  store<DTYPE>(array, position, elements);
}

// The masters, or the parameters that somebody has written to since;
// see [Note: 16-bit parameters and masters].
DEVICE Numbers current(const Update &args, const Elements<PARAM> &params, i64 position) {
  Numbers r = widen<PARAM>(params);
  if constexpr (HAS_MASTER) {
    const Numbers masters = widen<COMPUTE>(load<COMPUTE>(args.master, position));
    const Elements<PARAM> rounded = narrow<PARAM>(masters);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
      const u32 differs = rounded.words[i / 2] ^ params.words[i / 2];
      if (!(differs & (i % 2 ? 0xFFFF0000u : 0xFFFFu))) r.at[i] = masters.at[i];
    }
  }
  return r;
}

// Update the lanes of one segment by [Note: one formula]; return whether the
// parameters are finite.
DEVICE bool update_lanes(const Update &args, i64 position, Part part, const Coefficients &c) {
  Numbers p = current(args, load<PARAM>(args.targets[0], position), position);
  Numbers m = widen<COMPUTE>(load<COMPUTE>(args.exp_avg, position));
  Numbers v = widen<COMPUTE>(load<COMPUTE>(args.exp_avg_sq, position));
  const Numbers total = Tree<0, SOURCES>::sum(args.sources, position);
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    const Number mean = c.mean_scale * total.at[i];
    const Number g = c.source_scale * mean + c.weight_decay * p.at[i];
    m.at[i] = c.m_decay * m.at[i] + c.m_gain * g;
    v.at[i] = c.beta2 * v.at[i] + (c.v_gain * g) * g;
    Number v_hat = c.v_scale;
    if (bits_of(v_hat)) v_hat = v.at[i] * c.v_scale;  // else 0, even if v has overflowed
    const Number u = (c.g_scale * g + c.m_scale * m.at[i]) / (root(v_hat) + c.eps);
    p.at[i] = p.at[i] - (c.param_decay * p.at[i] + u);
  }
  if constexpr (HAS_MASTER) store_part<COMPUTE>(args.master, position, narrow<COMPUTE>(p), part);
  store_part<COMPUTE>(args.exp_avg, position, narrow<COMPUTE>(m), part);
  store_part<COMPUTE>(args.exp_avg_sq, position, narrow<COMPUTE>(v), part);
  const Elements<PARAM> params = narrow<PARAM>(p);
#pragma unroll
  for (int i = 0; i < TARGETS; i++) store_part<PARAM>(args.targets[i], position, params, part);
  const Numbers rounded = widen<PARAM>(params);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < LANES; i++) finite = finite & (!part.has(i) | is_finite(rounded.at[i]));
  return finite;
}

// A block updates one chunk; two of them find room on a multiprocessor whatever they sum.
KERNEL(update, 2, Update) {
  const Segment *segments = (const Segment *)args.segments;
  const i64 chunk = args.start + (i64)blockIdx.x * CHUNK;
  i32 number = ((const i32 *)args.first_segments)[blockIdx.x];
  bool finite = true;
#pragma unroll 1
  for (i32 offset = threadIdx.x * LANES; offset < CHUNK; offset += THREADS * LANES) {
    const i64 position = chunk + offset;
    while (number < args.num_segments && segments[number].stop <= position) number++;
#pragma unroll 1
    for (i32 each = number; each < args.num_segments; each++) {
      const i64 first = segments[each].start - position, stop = segments[each].stop - position;
      if (first >= LANES) break;
      const Part part = {first > 0 ? (i32)first : 0, stop < LANES ? (i32)stop : LANES};
      finite = finite & update_lanes(args, position, part, args.cohorts[segments[each].cohort]);
    }
  }
  if (!finite) atomicMin((i64 *)args.poisoned, args.origin + chunk);
}

#else

// -- Sum and measure ------------------------------------------------------------------------------
//
// Squares of a chunk are added up in 64 accumulators, every 64th element in one of them, and these
// in order: as in the loops for CPUs. A team of threads shares a chunk and its accumulators.

constexpr int ACCUMULATORS = 64, TEAM = ACCUMULATORS / LANES, CHUNKS = THREADS / TEAM;
constexpr int ROWS = SOURCES < 4 ? 4 / SOURCES : 1;  // are read at once, which hides latency

struct Reduce {
  u64 sources[SOURCES];  // addresses of the first element
  u64 out;               // likewise, or 0
  u64 square_sums;       // F64[num_chunks], or 0
  i64 num_chunks;
  Number factor;
};

SHARED F64 squares[THREADS * LANES];

template <Dtype DTYPE> DEVICE void store_sum(u64 array, i64 position, const Numbers &total) {
  if constexpr (DTYPE != NONE) store<DTYPE>(array, position, narrow<DTYPE>(total));
}

STAGE(reduce_chunks, Reduce) {
  const i64 chunk = (i64)blockIdx.x * CHUNKS + threadIdx.x / TEAM;
  if (chunk >= args.num_chunks) return;
  const i64 first = chunk * CHUNK + threadIdx.x % TEAM * LANES;
  F64 sums[LANES];
#pragma unroll
  for (int i = 0; i < LANES; i++) sums[i] = double_of(0);
#pragma unroll 1
  for (i32 offset = 0; offset < CHUNK; offset += ROWS * ACCUMULATORS) {
    Numbers totals[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++)
      totals[row] = Tree<0, SOURCES>::sum(args.sources, first + offset + row * ACCUMULATORS);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
      for (int i = 0; i < LANES; i++) {
        const Number total = totals[row].at[i] * args.factor;  // a factor of 1 changes no bit
        sums[i] = sums[i] + to_double(total) * to_double(total);
        totals[row].at[i] = total;
      }
      store_sum<OUT>(args.out, first + offset + row * ACCUMULATORS, totals[row]);
    }
  }
#pragma unroll
  for (int i = 0; i < LANES; i++) squares[threadIdx.x * LANES + i] = sums[i];
}

STAGE(add_squares, Reduce) {
  const i64 chunk = (i64)blockIdx.x * CHUNKS + threadIdx.x / TEAM;
  if (args.square_sums == 0 || threadIdx.x % TEAM != 0 || chunk >= args.num_chunks) return;
  F64 total = double_of(0);
#pragma unroll 8
  for (int i = 0; i < ACCUMULATORS; i++) total = total + squares[threadIdx.x * LANES + i];
  ((F64 *)args.square_sums)[chunk] = total;
}

KERNEL_OF_STAGES(reduce, 3, Reduce, reduce_chunks, add_squares)

#endif
