// The Python module vitzoo._C: empty. Importing it loads the shared library, whose static initialisers
// register the operators of csrc/*/ under vitzoo_native::.

#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
