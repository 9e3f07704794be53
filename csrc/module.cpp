// The Python module: importing it runs the static registrations of the kernels.
#include "products.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

namespace fastssl {

static int64_t probe() {
  int64_t bits = 0;
#if FASTSSL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) bits |= 1;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    bits |= 2;
  if ((bits & 2) && __builtin_cpu_supports("avx512bf16")) bits |= 4;
  // CPUID leaf 7, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE.
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 22 & 1) && (d >> 24 & 1)) bits |= 8;
  if (__builtin_cpu_is("amd")) bits |= 16;
  if (cblas_gemm_bf16bf16f32) bits |= 32;
  if ((bits & 2) && __builtin_cpu_supports("avx512vbmi")) bits |= 64;
#endif
  return bits;
}

static Cpu decode(int64_t bits) {
  return {bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8), bool(bits & 16),
          bool(bits & 32), bool(bits & 64)};
}

static int64_t features = probe();
static Cpu current = decode(features);
const Cpu& cpu() { return current; }

// 1 AVX2, 2 AVX-512, 4 AVX512-BF16, 8 AMX-BF16, 16 AMD, 32 the BLAS has bf16 x bf16 -> fp32,
// 64 AVX512-VBMI.
static int64_t cpu_features() { return features; }

// For tests: lets one machine run every path that it is able to. Bit 8 only chooses the library's
// bf16 products, which run everywhere; the others cannot be switched on where they are missing.
static void override_cpu_features(int64_t bits) {
  features = bits < 0 ? probe() : bits & (probe() | 8);
  current = decode(features);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastssl, m) {
  m.def("cpu_features() -> int");
  m.def("override_cpu_features(int bits) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastssl, CompositeExplicitAutograd, m) {
  m.impl("cpu_features", TORCH_BOX(&cpu_features));
  m.impl("override_cpu_features", TORCH_BOX(&override_cpu_features));
}

}  // namespace fastssl

extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
