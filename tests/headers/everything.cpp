// Every header once more, under hostile macros: with the headers' own translation units, each stands twice in one
// program.
// SPDX-License-Identifier: Apache-2.0
#include "poison.hpp"

#include <everything.hpp>

#ifndef TASKVEC_VERSION_MAJOR
#error "no header was included: the list of headers is empty"
#endif

int main() { }
