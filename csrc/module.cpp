// The Python module vlmfast._C. Importing it registers the operators' CPU implementations; it
// exports nothing else.
#include <Python.h>
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

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
