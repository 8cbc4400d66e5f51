// The runtime: start, devices, contexts, parameters, capabilities, errors, and the faults that tests provoke.
#include "fakecann.h"

#include <acl/acl.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

namespace fakecann {
namespace {

thread_local int device = -1;
thread_local std::string message, shown;
std::atomic<long> operators{0};
std::atomic<int> waiting{0};  // error that the next synchronisation reports
std::atomic<bool> lost{false};

const char* text(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

[[noreturn]] void refuse_setting(const std::string& sentence) {
  std::fprintf(stderr, "fakecann: %s\n", sentence.c_str());
  std::_Exit(2);
}

double number(const char* name, double otherwise, double low, double high) {
  const char* given = text(name, "");
  if (!*given) return otherwise;
  char* end = nullptr;
  double value = std::strtod(given, &end);
  if (*end || value < low || value > high) {
    refuse_setting(std::string(name) + " is '" + given + "'; give a number from " + std::to_string(low) + " to " +
                   std::to_string(high));
  }
  return value;
}

Fault read_fault() {
  Fault fault;
  std::vector<std::string> parts;
  std::istringstream stream(text("FAKECANN_FAULT", ""));
  for (std::string part; std::getline(stream, part, ':');) parts.push_back(part);
  if (parts.empty()) return fault;
  fault.kind = parts[0];
  bool named = fault.kind == "operator" || fault.kind == "async", ranked = fault.kind == "exit" || fault.kind == "hang";
  if (parts.size() != (named || ranked ? 3u : 2u) || !(named || ranked || fault.kind == "lost")) {
    refuse_setting("FAKECANN_FAULT must be operator:NAME:N, async:NAME:N, lost:N, exit:RANK:N or hang:RANK:N");
  }
  if (named) fault.name = parts[1];
  if (ranked) fault.rank = std::atol(parts[1].c_str());
  fault.count = std::atol(parts.back().c_str());
  return fault;
}

int lost_error() {
  return fail(ACL_ERROR_RT_LOST_HEARTBEAT,
              "the device is lost: its heartbeat stopped after " + std::to_string(fault().count) + " operators");
}

}  // namespace

const Settings& settings() {
  static const Settings values{static_cast<int>(number("FAKECANN_DEVICES", 8, 1, 64)),
                               static_cast<size_t>(number("FAKECANN_HBM_GIB", 64, 1e-3, 1024) * (1 << 30)),
                               text("FAKECANN_SOC", "Ascend910B1"), text("FAKECANN_TRACE", ""),
                               static_cast<int>(number("FAKECANN_TIMEOUT_S", 120, 1, 1e5))};
  return values;
}

const Fault& fault() {
  static const Fault value = read_fault();
  return value;
}

int fail(int code, const std::string& sentence) {
  message = "fakecann: " + sentence;
  return code;
}

int current_device() { return device < 0 ? 0 : device; }

void trace(const std::string& name) {
  if (settings().trace.empty()) return;
  static std::mutex mutex;
  static std::FILE* file = std::fopen(settings().trace.c_str(), "a");
  if (!file) refuse_setting("FAKECANN_TRACE names a file that cannot be written: " + settings().trace);
  std::lock_guard<std::mutex> lock(mutex);
  std::fprintf(file, "%s\n", name.c_str());
  std::fflush(file);
}

int begin_operator(const std::string& name) {
  trace(name);
  long done = ++operators;
  if (fault().kind.empty()) return 0;
  if (fault().kind == "lost" && done > fault().count) lost = true;
  if (lost) return lost_error();
  static std::atomic<long> matching{0};
  if (name != fault().name || ++matching != fault().count) return 0;
  if (fault().kind == "operator") return fail(ACL_ERROR_RT_AICORE_EXCEPTION, name + " failed as FAKECANN_FAULT asks");
  waiting = ACL_ERROR_RT_AICORE_EXCEPTION;
  return 0;
}

int pending_error(bool synchronising) {
  if (lost) return lost_error();
  if (!synchronising) return 0;
  int code = waiting.exchange(0);
  return code ? fail(code, "an earlier " + fault().name + " raised an exception in an AI core") : 0;
}

}  // namespace fakecann

using namespace fakecann;

// Only the emulator has this symbol; moe_kernels.device asks for it to tell emulated from real.
EXPORT int fakecannVersion() { return 1; }

extern "C" {

const char* aclrtGetSocName() { return settings().soc.c_str(); }

const char* aclGetRecentErrMsg() {
  shown = std::exchange(message, "");
  return shown.c_str();
}

// torch_npu chooses its ways by the version of CANN. Before 8.5.0, or without one, it passes no determinism on; with
// 9.1.0 it groups messages between ranks through one more library, libhcomm.
aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, "8.5.0");
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  return give(version, {"8.5.0", "8", "5", "0", "", ""});
}

aclError aclrtGetDeviceCount(uint32_t* count) { return give(count, settings().devices); }

aclError aclrtSetDevice(int32_t id) {
  if (id < 0 || id >= settings().devices) {
    return fail(ACL_ERROR_RT_INVALID_DEVICEID,
                "device " + std::to_string(id) + " does not exist; there are " + std::to_string(settings().devices));
  }
  device = id;
  return pending_error(false);
}

aclError aclrtGetDevice(int32_t* id) { return device < 0 ? ACL_ERROR_RT_CONTEXT_NULL : give(id, device); }

// A context is the number of its device plus one, so that none is null.
aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  return give(context, reinterpret_cast<aclrtContext>(static_cast<intptr_t>(device) + 1));
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  return give(&device, static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
}

aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  return give(active, 1);
}

// Parameters of the process and of a context are the same here; torch_npu sets both before every operator.
static std::map<int, int64_t> parameters;
static std::mutex parameters_mutex;

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  std::lock_guard<std::mutex> lock(parameters_mutex);
  int64_t before = std::exchange(parameters[option], value);
  if (option == ACL_OPT_DETERMINISTIC && before != value) trace("deterministic=" + std::to_string(value));
  return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  std::lock_guard<std::mutex> lock(parameters_mutex);
  return give(value, parameters[option]);
}

// Cube and vector cores and second-level cache as on one 910B; nothing else is claimed about the chip.
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  if (attribute == ACL_DEV_ATTR_AICORE_CORE_NUM) return give(value, 24);
  return give(value, attribute == ACL_DEV_ATTR_VECTOR_CORE_NUM ? 48 : 0);
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo property, int64_t* value) {
  if (property == ACL_DEVICE_INFO_AI_CORE_NUM) return give(value, 24);
  return give(value, property == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 48 : 192 << 20);
}

aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* rate) {
  rate->cubeUtilization = rate->vectorUtilization = rate->aicpuUtilization = rate->memoryUtilization = 0;
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* possible, int32_t, int32_t) { return give(possible, 1); }
aclError aclrtDeviceGetBareTgid(int32_t* pid) { return give(pid, 0); }
aclError aclmdlSetDump(const char*) { return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "dumps are not emulated"); }

}  // extern "C"

ACCEPTED(aclInit) ACCEPTED(aclFinalize) ACCEPTED(aclAppLog) ACCEPTED(aclrtResetDevice)
ACCEPTED(aclrtDeviceEnablePeerAccess) ACCEPTED(aclrtSetDeviceSatMode) ACCEPTED(aclrtSetOpExecuteTimeOut)
ACCEPTED(aclrtSetOpWaitTimeout) ACCEPTED(aclrtPeekAtLastError) ACCEPTED(aclrtGetLastError)
ACCEPTED(aclmdlInitDump) ACCEPTED(aclmdlFinalizeDump)
