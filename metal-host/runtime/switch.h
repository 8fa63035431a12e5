// Leaves one stack for another: the only part of a fibre that C++ cannot say.
#pragma once
#include <cstddef>
#include <cstring>

// Saves the callee's registers and the stack pointer in `*from`, and goes on where `to` was saved.
extern "C" void msl_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");

// A saved stack on which the first switch enters `start`: six registers and its address.
inline void* fresh_stack(char* top, void (*start)()) {
  void** place = reinterpret_cast<void**>(top - 64);
  *--place = nullptr;  // `start` finds the stack aligned as after a call; it never returns.
  *--place = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; i++) *--place = nullptr;
  return place;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,%function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size msl_switch,.-msl_switch
)");

// A saved stack on which the first switch enters `start`: register x30, which `ret` goes to.
inline void* fresh_stack(char* top, void (*start)()) {
  char* frame = top - 64 - 160;
  memset(frame, 0, 160);
  reinterpret_cast<void**>(frame)[11] = reinterpret_cast<void*>(start);
  return frame;
}
#else
#error "fibres are written for x86-64 and for 64-bit ARM"
#endif
