// Macros that well-known headers define with everyday names. The standard library and other people's headers come
// first: what is tested is that taskvec's own code uses none of these names.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bits/stdc++.h>

#include <Eigen/Dense>

#if defined(TASKVEC_TEST_XTENSOR)
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif
#if defined(TASKVEC_TEST_NLOPT)
#include <nlopt.hpp>
#endif
#if __has_include(<nlohmann/json.hpp>)
#include <nlohmann/json.hpp>
#endif
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// clang-format off
#define I ]poison[             // <complex.h>
#define small ]poison[         // <rpcndr.h>
#define near ]poison[          // <windef.h>
#define far ]poison[
#define interface ]poison[     // <combaseapi.h>
#define IN ]poison[
#define OUT ]poison[
#define OPTIONAL ]poison[
#define ERROR ]poison[         // <wingdi.h>
#define DELETE ]poison[        // <winnt.h>
#define TRUE ]poison[
#define FALSE ]poison[
#define BOOL ]poison[
#define Bool ]poison[          // <X11/Xlib.h>
#define None ]poison[
#define Status ]poison[
#define Success ]poison[
#define Always ]poison[
#define major ]poison[         // <sys/sysmacros.h>
#define minor ]poison[
#define unix ]poison[          // gnu++ modes
#define linux ]poison[
#define nil ]poison[
#define B0 ]poison[            // <termios.h>
#define ECHO ]poison[
#define signals ]poison[       // Qt
#define slots ]poison[
#define emit ]poison[
#define foreach ]poison[
#define _ ]poison[             // gettext
// clang-format on
