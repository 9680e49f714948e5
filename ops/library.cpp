// Entry of the extension module las_mm._C. Loading it runs the static registrations of the files
// in cpu/ and cuda/; the module itself is empty. Schemas live in las_mm/ops/.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
