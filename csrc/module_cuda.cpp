// The Python module vitzoo._C_cuda: empty. Importing it loads the shared library, whose static initialisers
// register the CUDA kernels of csrc/*/ under the schemas that vitzoo._C defines.

#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
