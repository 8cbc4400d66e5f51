// What the emulator does not do: each of these says so by name instead of returning something that looks right.
//
// The legacy path (aclop*) compiles operators on demand; torch_npu falls back to it for what has no aclnn operator.
// Describing such an operator works, running it fails. Profiling calls are accepted and record nothing.
#include "fakecann.h"

#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <aml/aml_fwk_detect.h>
#include <profiling/prof_api.h>

#include <vector>

using namespace fakecann;

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> sizes;
};

struct aclDataBuffer {};
struct aclopAttr {};

static aclError refuse(const std::string& what) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, what + " is not emulated");
}

static aclError refuse_operator(const char* name) {
  return refuse(std::string("the operator ") + (name ? name : "without a name") +
                ", as the legacy kernel or as aclnn,");
}

extern "C" {

aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const[], const aclDataBuffer* const[], int,
                                const aclTensorDesc* const[], aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return refuse_operator(name);
}

aclError aclopCompileAndExecuteV2(const char* name, int, aclTensorDesc*[], aclDataBuffer*[], int, aclTensorDesc*[],
                                  aclDataBuffer*[], aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                  aclrtStream) {
  return refuse_operator(name);
}

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* sizes, aclFormat format) {
  return new aclTensorDesc{type, format, {sizes, sizes + count}};
}

void aclDestroyTensorDesc(const aclTensorDesc* description) { delete description; }
aclDataType aclGetTensorDescType(const aclTensorDesc* description) { return description->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc* description) { return description->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* description) { return description->sizes.size(); }

aclError aclGetTensorDescDimV2(const aclTensorDesc* description, size_t index, int64_t* size) {
  if (index >= description->sizes.size()) return ACL_ERROR_RT_PARAM_INVALID;
  *size = description->sizes[index];
  return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return new aclDataBuffer; }

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return ACL_SUCCESS;
}

// Options of the legacy compiler: kept by nobody, since nothing is compiled.
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
  if (length) value[0] = 0;
  return ACL_SUCCESS;
}

// Expandable segments and memory shared between processes.
aclError aclrtReserveMemAddress(void**, size_t, size_t, void*, uint64_t) { return refuse("virtual memory"); }
aclError aclrtReleaseMemAddress(void*) { return refuse("virtual memory"); }
aclError aclrtMallocPhysical(aclrtDrvMemHandle*, size_t, const aclrtPhysicalMemProp*, uint64_t) {
  return refuse("virtual memory");
}
aclError aclrtFreePhysical(aclrtDrvMemHandle) { return refuse("virtual memory"); }
aclError aclrtMapMem(void*, size_t, size_t, aclrtDrvMemHandle, uint64_t) { return refuse("virtual memory"); }
aclError aclrtUnmapMem(void*) { return refuse("virtual memory"); }
aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t*) {
  return refuse("memory shared between processes");
}
aclError aclrtMemImportFromShareableHandle(uint64_t, int32_t, aclrtDrvMemHandle*) {
  return refuse("memory shared between processes");
}
aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t*, size_t) {
  return refuse("memory shared between processes");
}

// Kernels given as machine code.
aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*, aclrtBinHandle*) {
  return refuse("a kernel in machine code");
}
aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char* name, aclrtFuncHandle*) {
  return refuse(std::string("the kernel ") + name);
}
aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) { return refuse("a kernel in machine code"); }
aclError aclrtProcessReport(int32_t) { return refuse("a host callback"); }
EXPORT int rtDevBinaryRegister(const void*, void**) { return refuse("a kernel in machine code"); }
EXPORT int rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) {
  return refuse("a kernel in machine code");
}
EXPORT int rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void*) {
  return refuse("a kernel in machine code");
}
EXPORT int rtGetC2cCtrlAddr(uint64_t*, uint32_t*) { return refuse("a kernel in machine code"); }

int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
int32_t MsprofReportApi(uint32_t, const MsprofApi*) { return 0; }
int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
uint64_t MsprofSysCycleTime() { return 0; }

}  // extern "C"
