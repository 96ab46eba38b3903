// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

// Functions that are compiled for several instruction sets; the CPU chooses.

#pragma once

#if defined(__x86_64__)
#define MULTIVERSION \
  __attribute__((    \
      target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))
