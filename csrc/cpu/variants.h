// One kernel table for each instruction set, all of one name: declared for the variant files that
// define it, and for the operator that chooses.
#pragma once

#ifdef __x86_64__
#define VLMFAST_DECLARE_VARIANTS(Kernel, name) \
  namespace base {                             \
  extern const Kernel name;                    \
  }                                            \
  namespace avx2 {                             \
  extern const Kernel name;                    \
  }                                            \
  namespace avx512 {                           \
  extern const Kernel name;                    \
  }                                            \
  namespace avx512_bf16 {                      \
  extern const Kernel name;                    \
  }
// The table of the instruction set in force; needs cpu/isa.h.
#define VLMFAST_CURRENT_VARIANT(name) \
  select_variant(base::name, avx2::name, avx512::name, avx512_bf16::name)
#else
#define VLMFAST_DECLARE_VARIANTS(Kernel, name) \
  namespace base {                             \
  extern const Kernel name;                    \
  }
#define VLMFAST_CURRENT_VARIANT(name) (base::name)
#endif
