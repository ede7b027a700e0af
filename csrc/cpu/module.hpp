// What the parts of the Python module share: the table of instruction sets, and checks of what Python passes.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "kernels.hpp"
#include "threads.hpp"

namespace bytelane::cpu {

[[noreturn]] void refuse(const std::string& rule);  // raises ValueError

// The kernels of an index into `isas()`; refuses one that this processor lacks.
const Kernels& kernels(int isa);

Dtype dtype_of(int dtype);

void check_sizes(std::int64_t m, std::int64_t n, std::int64_t k, int bits, std::int64_t group_size, int path);

// Rows of codes that are not dotted in integers: a table, or the weight of a layer without an input scale.
void check_table(std::int64_t count, std::int64_t k, int bits, std::int64_t groups);

// Refuses a number of output scales that is neither 0, 1 nor n; the step from one channel's to the next.
std::int64_t check_output_scales(std::int64_t output_scales, std::int64_t n);

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The decoder layer and the kernels it is made of: module_decoder.cpp.
void bind_decoder(nanobind::module_& m);

}  // namespace bytelane::cpu
