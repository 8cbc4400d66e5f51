// What the emulator does not do: each of these says so by name instead of returning something that looks right.
//
// The legacy path (aclop*) compiles operators on demand; torch_npu falls back to it for what has no aclnn operator.
// Describing such an operator works, running it fails. Profiling calls are accepted and record nothing.
#include "fakecann.h"

#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <aml/aml_fwk_detect.h>
#include <profiling/prof_api.h>

using namespace fakecann;

struct aclTensorDesc {};
struct aclDataBuffer {};
struct aclopAttr {};
template <typename Object>
static Object one;  // description, buffer or list of attributes stands for all, since nobody reads them

static aclError refuse(const std::string& what) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, what + " is not emulated");
}

extern "C" {

aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const[], const aclDataBuffer* const[], int,
                                const aclTensorDesc* const[], aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  std::string given = name ? name : "without a name";
  return refuse("the operator " + given + ", as the legacy kernel or as aclnn,");
}

aclError aclopCompileAndExecuteV2(const char* name, int, aclTensorDesc*[], aclDataBuffer*[], int, aclTensorDesc*[],
                                  aclDataBuffer*[], aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                  aclrtStream) {
  return aclopCompileAndExecute(name, 0, {}, {}, 0, {}, {}, {}, {}, {}, {}, {});
}

aclTensorDesc* aclCreateTensorDesc(aclDataType, int, const int64_t*, aclFormat) { return &one<aclTensorDesc>; }
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return &one<aclDataBuffer>; }
aclopAttr* aclopCreateAttr() { return &one<aclopAttr>; }

size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
  if (length) value[0] = 0;
  return ACL_SUCCESS;
}

aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char* name, aclrtFuncHandle*) {
  return refuse(std::string("the kernel ") + name);
}

uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
uint64_t MsprofSysCycleTime() { return 0; }

static aclError refuse_virtual_memory() { return refuse("virtual memory"); }
static aclError refuse_shared_memory() { return refuse("memory shared between processes"); }
static aclError refuse_callback() { return refuse("a host callback"); }
static aclError refuse_kernel() { return refuse("a kernel in machine code"); }
int rtDevBinaryRegister(const void*, void**) { return refuse_kernel(); }
int rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) { return refuse_kernel(); }
int rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void*) { return refuse_kernel(); }
int rtGetC2cCtrlAddr(uint64_t*, uint32_t*) { return refuse_kernel(); }

}  // extern "C"

// Descriptions, attributes and options of the legacy compiler: kept by nobody, since nothing is compiled.
ACCEPTED(aclDestroyTensorDesc) ACCEPTED(aclGetTensorDescType) ACCEPTED(aclGetTensorDescFormat)
ACCEPTED(aclGetTensorDescNumDims) ACCEPTED(aclGetTensorDescDimV2) ACCEPTED(aclDestroyDataBuffer)
ACCEPTED(aclopDestroyAttr) ACCEPTED(aclSetTensorDescName) ACCEPTED(aclSetTensorFormat) ACCEPTED(aclSetTensorShape)
ACCEPTED(aclSetTensorPlaceMent)
ACCEPTED(aclopSetAttrBool) ACCEPTED(aclopSetAttrInt) ACCEPTED(aclopSetAttrFloat) ACCEPTED(aclopSetAttrString)
ACCEPTED(aclopSetAttrDataType) ACCEPTED(aclopSetAttrListBool) ACCEPTED(aclopSetAttrListInt)
ACCEPTED(aclopSetAttrListFloat) ACCEPTED(aclopSetAttrListListInt) ACCEPTED(aclSetCompileopt)

// Profiling.
ACCEPTED(MsprofRegisterCallback) ACCEPTED(MsprofReportApi) ACCEPTED(MsprofReportCompactInfo)
ACCEPTED(MsprofReportAdditionalInfo)

// Expandable segments, memory shared between processes, kernels given as machine code.
SAME_AS(refuse_virtual_memory, aclrtReserveMemAddress) SAME_AS(refuse_virtual_memory, aclrtReleaseMemAddress)
SAME_AS(refuse_virtual_memory, aclrtMallocPhysical) SAME_AS(refuse_virtual_memory, aclrtFreePhysical)
SAME_AS(refuse_virtual_memory, aclrtMapMem) SAME_AS(refuse_virtual_memory, aclrtUnmapMem)
SAME_AS(refuse_shared_memory, aclrtMemExportToShareableHandle)
SAME_AS(refuse_shared_memory, aclrtMemImportFromShareableHandle)
SAME_AS(refuse_shared_memory, aclrtMemSetPidToShareableHandle)
SAME_AS(refuse_kernel, aclrtBinaryLoadFromData) SAME_AS(refuse_kernel, aclrtGetFunctionAddr)
SAME_AS(refuse_callback, aclrtProcessReport)
