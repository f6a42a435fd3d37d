// The host side of deadlines: their length, the stall record's memory, and the report.
#include "deadline.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "checks.h"

namespace lightning_fastmoe {
namespace {

constexpr double kDefaultSeconds = 60;
constexpr const char* kVariable = "LIGHTNING_FASTMOE_DEVICE_TIMEOUT";

// A non-negative number from the environment; the default where it isn't set.
double number_of(const char* variable, double otherwise) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  STD_TORCH_CHECK(*end == '\0' && number >= 0, variable, "=", text,
                  " is not a number of seconds, 0 or more");
  return number;
}

double limit_seconds() {
  static const double seconds = number_of(kVariable, kDefaultSeconds);
  return seconds;
}

// One for all devices of the process, and never freed: a kernel may write to it until exit.
StallRecord* record() {
  static std::mutex mutex;
  static StallRecord* memory = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (memory != nullptr) return memory;
  // The first call may come while a graph is captured, which otherwise refuses allocations.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* pointer = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&pointer, sizeof(StallRecord), cudaHostAllocPortable | cudaHostAllocMapped);
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  STD_CUDA_CHECK(error);
  StallRecord* made = static_cast<StallRecord*>(pointer);
  made->op = 0;
  made->waiter = 0;
  return memory = made;
}

}  // namespace

// Plus one, since the first tick may be almost over at the start; without a limit, the maximum.
uint32_t ticks_of(double seconds) {
  constexpr double kTicksPerSecond = 1e9 / (1 << kTickBits), kMost = 4e9;
  const double ticks = seconds * kTicksPerSecond;
  return static_cast<uint32_t>(ticks <= 0 || ticks > kMost ? kMost : ticks + 1);
}

std::string stall_report() {
  const StallRecord* found = record();
  const uint64_t waiter = found->waiter;
  if (waiter == 0) return "";
  const auto* op = reinterpret_cast<const char*>(static_cast<uintptr_t>(found->op));
  const std::string detail = std::to_string((waiter >> 5) & 0x7f);
  std::string what;
  switch (static_cast<WaitFor>(waiter & 0xf)) {
    case WaitFor::kFullStage:
      what = "stage " + detail + " of its pipeline to be filled";
      break;
    case WaitFor::kEmptyStage:
      what = "stage " + detail + " of its pipeline to be emptied";
      break;
    case WaitFor::kGrid:
      what = "the other blocks of its grid";
      break;
    case WaitFor::kRank:  // not a bug in a kernel
      return "the exchange of tokens gave up: rank " + std::to_string((waiter >> 4) & 0xfff) +
             " of the expert parallel group was not there in time, was in another exchange, or had"
             " given up before. The process can't use this GPU any more.";
  }
  char text[32];
  std::snprintf(text, sizeof(text), "%g", limit_seconds());
  return "the CUDA kernel of " + std::string(op) + " stood still: after " + text +
         " seconds, thread " + std::to_string((waiter >> 16) & 0xffff) + " of block " +
         std::to_string(waiter >> 32) + " still waited for " + what +
         ". The kernel has ended itself, and the process can't use this GPU any more. Please report"
         " this as a bug, with this message. " +
         kVariable + " (in seconds, 0 for no limit) changes how long kernels wait.";
}

Deadline deadline_for(const char* op) {
  StallRecord* where = record();
  if (where->waiter != 0) STD_TORCH_CHECK(false, op, ": ", stall_report());
  Deadline deadline{ticks_of(limit_seconds()), static_cast<uint64_t>(reinterpret_cast<uintptr_t>(op)), where};
#ifdef LIGHTNING_FASTMOE_DELAYS
  constexpr double kDelaySeconds = 20e-6;
  deadline.delay_nanoseconds =
      static_cast<uint64_t>(1e9 * number_of("LIGHTNING_FASTMOE_DELAY", kDelaySeconds));
#endif
  return deadline;
}

}  // namespace lightning_fastmoe
