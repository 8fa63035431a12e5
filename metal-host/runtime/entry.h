// Everything that stands before a kernel's text; the last part is for the call that is written after it.
#pragma once
#include <metal_stdlib>
#include <mlx_utils.h>

#include "abi.h"

// The runtime that calls it is not instrumented, so MemorySanitizer has no shadow for its arguments.
#define MSL_ENTRY extern "C" __attribute__((no_sanitize("memory"))) void msl_entry

METAL_FUNC uint3 msl_id(const MslUint3& id) { return uint3(id.x, id.y, id.z); }
METAL_FUNC uint msl_id(uint id) { return id; }
