// What the library vlmfast._C registers beside the kernels. torch.ops.load_library loads it: it is
// no Python module, so that it needs neither Python's headers nor a build for each Python.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string cpu_isa() { return vlmfast::cpu::isa_name(vlmfast::cpu::current_isa()); }

std::string cpu_isas() {
  std::string names;
  for (auto isa : vlmfast::cpu::available_isas()) {
    if (!names.empty()) names += ",";
    names += vlmfast::cpu::isa_name(isa);
  }
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmfast, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vlmfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}
