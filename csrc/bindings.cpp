// packattn._C: the schemas of torch.ops.packattn and an empty Python module, so that `import packattn._C` loads them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "packattn_schemas.h"  // written by setup.py from packattn/schemas.py

STABLE_TORCH_LIBRARY(packattn, m) {
  for (const char* schema : kPackattnSchemas) m.def(schema);
}

extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU operators of packattn.", -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
