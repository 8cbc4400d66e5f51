// What every part of the emulator shares: settings, error messages, provoked faults, and who owns which memory.
//
// fakecann stands in for the libraries of Huawei's CANN that the torch_npu wheel links against or opens by name, and
// computes on the CPU. Every signature is checked by the compiler against the headers inside that wheel.
//
// Environment:
//   FAKECANN_DEVICES   number of devices, 1 to 64 (default 8)
//   FAKECANN_HBM_GIB   memory of each device (default 64; fractions allowed)
//   FAKECANN_SOC       name of the chip (default Ascend910B1)
//   FAKECANN_TRACE     a file that gets one line per operator and collective, in the order of execution, and one
//                      (deterministic=1) when torch_npu asks for reproducible operators or no longer does
//   FAKECANN_FAULT     one fault, see faults() below
//   FAKECANN_TIMEOUT_S how long a collective waits for its peers (default 120)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fakecann {

struct Settings {
  int devices;
  size_t hbm_bytes;
  std::string soc;
  std::string trace;
  int timeout_s;
};

// A fault asked for by FAKECANN_FAULT, its parts separated by colons:
//   operator:NAME:N   the N-th call of operator NAME reports an error at once
//   async:NAME:N      that call reports success; the next synchronisation reports the error, as on the real device
//   lost:N            after N operators the device is gone: every call fails from then on
//   exit:RANK:N       the process of that rank ends at its N-th collective without a word
//   hang:RANK:N       that rank never arrives at its N-th collective
struct Fault {
  std::string kind, name;
  long rank = -1, count = 0;
};

const Settings& settings();
const Fault& fault();

// The sentence that aclGetRecentErrMsg hands to torch_npu on this thread; returns `code` for `return fail(...)`.
int fail(int code, const std::string& message);
// Counts an operator, writes it to the trace and returns the error of a fault that is due, or 0.
int begin_operator(const std::string& name);
// The error of a lost device or of an asynchronous fault that waits for a synchronisation, or 0.
int pending_error(bool synchronising);
void trace(const std::string& name);
// Whether `bytes` bytes from `data` lie inside one block that aclrtMalloc gave out.
bool owns(const void* data, size_t bytes);
int current_device();

// Success of a call that has one output.
template <typename Output>
int give(Output* output, std::type_identity_t<Output> value) {
  *output = value;
  return 0;
}

}  // namespace fakecann

// Defines functions of the headers that read none of their arguments, as one function of this file. The compiler checks
// that the headers have the name; the two warnings are about what they leave out.
#define SAME_AS(FUNCTION, NAME) extern "C" decltype(NAME) NAME __attribute__((alias(#FUNCTION)));
#define ACCEPTED(NAME) SAME_AS(accepted, NAME)
#pragma GCC diagnostic ignored "-Wattribute-alias"
#pragma GCC diagnostic ignored "-Wmissing-attributes"
extern "C" {
[[maybe_unused]] static int64_t accepted() { return 0; }
}
