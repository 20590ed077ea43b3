#include "cpu/isa.h"

#include <cstdlib>

#include "checks.h"

namespace vlmfast::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "base";
  }
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found{Isa::kBase};
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c")))
      return found;
    found.push_back(Isa::kAvx2);
#ifdef VLMFAST_EMULATE_AVX512
    found.push_back(Isa::kAvx512);
    found.push_back(Isa::kAvx512Bf16);
    return found;
#endif
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
      return found;
    found.push_back(Isa::kAvx512);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(Isa::kAvx512Bf16);
#endif
    return found;
  }();
  return isas;
}

Isa current_isa() {
  const char* wanted = std::getenv("VLMFAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return available_isas().back();
  std::string names;
  for (Isa isa : available_isas()) {
    if (isa_name(isa) == std::string(wanted)) return isa;
    names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  VLMFAST_CHECK(false, "VLMFAST_CPU_ISA: expected one of ", names, " on this machine, got '",
                wanted, "'");
  return Isa::kBase;
}

}  // namespace vlmfast::cpu
