// Parts of the module icegrt._C that are bound in files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace icegrt {

void def_heads_and_pages(pybind11::module_& m);

}  // namespace icegrt
