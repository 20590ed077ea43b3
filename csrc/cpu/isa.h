// Which instruction-set variant of the kernels runs on this machine.
#pragma once
#include <string>
#include <vector>

namespace vlmfast::cpu {

enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16 };

// The variants that this machine can run, worst first.
const std::vector<Isa>& available_isas();
const char* isa_name(Isa isa);
// The best available variant, or the one that the environment variable VLMFAST_CPU_ISA names.
// Throws where that one is unknown or cannot run here.
Isa current_isa();

template <class Kernel>
const Kernel& select_variant(const Kernel& base, const Kernel& avx2, const Kernel& avx512,
                             const Kernel& avx512_bf16) {
  switch (current_isa()) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512_bf16;
    default:
      return base;
  }
}

}  // namespace vlmfast::cpu
