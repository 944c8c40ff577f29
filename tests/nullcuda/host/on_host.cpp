// Lets torch's CPU kernels compute on tensors of the null device, whose memory is host memory: every operator that has a CUDA
// kernel and a CPU one gets a kernel for CUDA that sees its tensors as CPU tensors of the same memory and calls the operator
// again. What it returns is made a CUDA tensor. Views and factories stay as they are. Operators without a CPU kernel are an
// error, except for those that Python replaces (cuda_only.py, attention.py): their CUDA kernels would compute nothing.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>
#include <torch/extension.h>
#include <mutex>
#include <set>
#include <unordered_map>

extern "C" void nullcuda_on_replay(void (*f)(void *));
extern "C" void nullcuda_on_destroy(void (*f)(void *));
extern "C" void *nullcuda_capture(void *stream);

using at::Tensor;
using c10::IValue;

namespace {

const std::set<std::string> KEPT = {"aten::empty",
                                    "aten::empty_strided",
                                    "aten::resize_",
                                    "aten::set_",
                                    "aten::_local_scalar_dense",
                                    "aten::record_stream",
                                    "aten::_pin_memory",
                                    "aten::is_pinned",
                                    "aten::_has_compatible_shallow_copy_type",
                                    "aten::resize_as_",
                                    "aten::_resize_output_",
                                    "aten::_reshape_alias",
                                    "aten::_efficientzerotensor",
                                    "aten::_cudnn_init_dropout_state"};
// Operators that may be given tensors of the host beside those of the device.
const std::set<std::string> MIXED = {"aten::copy_",
                                     "aten::_foreach_copy_",
                                     "aten::index",
                                     "aten::_index_put_impl_",
                                     "aten::index_put_",
                                     "aten::index_put",
                                     "aten::_unsafe_index",
                                     "aten::equal",
                                     "aten::_amp_foreach_non_finite_check_and_unscale_"};

// One call of an operator: its tensors of the device and how the host sees them.
struct Call {
    std::unordered_map<c10::TensorImpl *, std::pair<Tensor, Tensor>> of; // alias -> (alias, original)
    at::Device device{at::kCUDA, 0};
    bool has_cuda = false, has_host = false;

    Tensor alias(const Tensor &t) {
        if (!t.defined()) return t;
        if (!t.is_cuda()) {
            if (t.device().is_cpu() && t.dim() > 0) has_host = true;
            return t;
        }
        has_cuda = true;
        device = t.device();
        Tensor r;
        auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
        if (t.numel() == 0) {
            r = at::empty_strided(t.sizes(), t.strides(), options);
        } else r = at::from_blob(const_cast<void *>(t.const_data_ptr()), t.sizes(), t.strides(), options);
        if (t.is_conj()) r._set_conj(true);
        if (t.is_neg()) r._set_neg(true);
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
        of[r.unsafeGetTensorImpl()] = {r, t};
        return r;
    }
    Tensor back(const Tensor &t) {
        if (!t.defined()) return t;
        auto found = of.find(t.unsafeGetTensorImpl());
        if (found != of.end()) return found->second.second;
        if (!t.is_cpu()) return t;
        Tensor dense = t.is_non_overlapping_and_dense() ? t : t.contiguous();
        Tensor r = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(device));
        if (dense.numel()) memcpy(r.mutable_data_ptr(), dense.const_data_ptr(), dense.numel() * dense.element_size());
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
        return r;
    }
    void settle() { // outputs that were resized
        for (auto &[impl, pair] : of) {
            auto &[a, t] = pair;
            if (a.sizes() != t.sizes()) {
                t.resize_(a.sizes());
                Tensor c = a.contiguous();
                if (c.numel()) memcpy(t.mutable_data_ptr(), c.const_data_ptr(), c.numel() * c.element_size());
            }
        }
    }
};

// What was done within a capture, to be done again at each launch of its graph, until that is destroyed. Never freed itself:
// at the end of the process Python has ended before.
auto &recorded = *new std::unordered_map<void *, std::vector<std::function<void()>>>;

void *capture() { return nullcuda_capture(c10::cuda::getCurrentCUDAStream().stream()); }

void replay_all(void *graph) {
    auto found = recorded.find(graph);
    if (found == recorded.end()) return;
    for (auto &action : found->second) action();
}

void forget(void *graph) {
    auto found = recorded.find(graph);
    if (found == recorded.end()) return;
    auto actions = std::move(found->second); // whose tensors may be the last of other graphs
    recorded.erase(found);
}

Tensor on_device(const Tensor &t) { // a view of its memory as the host's, which does not keep it
    Call call;
    return call.alias(t);
}

void write_into(const Tensor &target, const Tensor &value) { // the memory of `target`, which had this value's strides
    Tensor dense = value.is_non_overlapping_and_dense() ? value : value.contiguous();
    TORCH_CHECK(dense.sizes() == target.sizes(), "a replay gave another shape");
    if (dense.numel()) memcpy(target.mutable_data_ptr(), dense.const_data_ptr(), dense.numel() * dense.element_size());
}

at::Generator host_generator(const std::optional<at::Generator> &given, at::Device device) {
    at::Generator g =
        given.has_value() && given->defined() ? *given : at::cuda::detail::getDefaultCUDAGenerator(device.index());
    if (g.device().is_cpu()) return g;
    std::lock_guard<std::mutex> held(g.mutex());
    auto *cuda = at::check_generator<at::CUDAGeneratorImpl>(g);
    uint64_t seed = cuda->current_seed(), offset = cuda->get_offset();
    cuda->set_offset(offset + 4);
    return at::detail::createCPUGenerator(seed * 0x9E3779B97F4A7C15ull + offset);
}

// Large zeros cost no memory: their pages are given back. Returns whether the call was such a one.
bool zero_large(const c10::FunctionSchema &schema, torch::jit::Stack *stack) {
    const auto n = schema.arguments().size();
    if (n > 2 || (schema.name() != "aten::zero_" && schema.name() != "aten::fill_")) return false;
    const IValue self = (*stack)[stack->size() - n], value = stack->back();
    if (!self.isTensor() || !self.toTensor().is_cuda()) return false;
    Tensor t = self.toTensor();
    if (!t.is_non_overlapping_and_dense() || t.nbytes() < 1 << 20) return false;
    if (n == 2 && !(value.isScalar() && value.toScalar().toDouble() == 0.0)) return false;
    void *p = t.mutable_data_ptr();
    size_t size = t.nbytes();
    auto zero = [p, size]() { cudaMemset(p, 0, size); };
    zero();
    if (void *graph = capture()) recorded[graph].push_back(zero);
    torch::jit::drop(*stack, n);
    stack->push_back(t);
    return true;
}

void on_host(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
    const auto &schema = op.schema();
    const auto n = schema.arguments().size();
    if (zero_large(schema, stack)) return;
    const auto first = stack->size() - n;
    Call call;
    call.device = at::Device(at::kCUDA, c10::cuda::current_device());
    for (size_t i = 0; i < n; i++) {
        IValue &v = (*stack)[first + i];
        if (v.isTensor()) v = call.alias(v.toTensor());
        else if (v.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor &t : v.toTensorVector()) list.push_back(call.alias(t));
            v = list;
        } else if (v.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> list;
            for (const auto &t : v.toOptionalTensorVector())
                list.push_back(t.has_value() ? std::optional<Tensor>(call.alias(*t)) : std::nullopt);
            v = list;
        } else if (v.isDevice() && v.toDevice().is_cuda()) {
            call.device = v.toDevice();
            v = at::Device(at::kCPU);
        } else if (schema.arguments()[i].name() == "pin_memory") v = IValue();
    }
    for (size_t i = 0; i < n; i++)
        if (schema.arguments()[i].name() == "generator") {
            IValue &v = (*stack)[first + i];
            v = host_generator(v.isNone() ? std::nullopt : std::optional<at::Generator>(v.toGenerator()), call.device);
        }
    TORCH_CHECK(!(call.has_cuda && call.has_host) || MIXED.count(schema.name()),
                "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu (null device, in ",
                schema.name(), ")");
    void *graph = capture();
    torch::jit::Stack given;
    if (graph) given.assign(stack->end() - n, stack->end());
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        op.callBoxed(stack);
    }
    call.settle();
    std::vector<std::pair<int, Tensor>> made;
    const auto returns = schema.returns().size();
    for (size_t i = stack->size() - returns; i < stack->size(); i++) {
        IValue &v = (*stack)[i];
        if (v.isTensor()) {
            bool is_new = v.toTensor().defined() && !call.of.count(v.toTensor().unsafeGetTensorImpl());
            v = call.back(v.toTensor());
            if (graph && is_new) made.push_back({int(i - (stack->size() - returns)), on_device(v.toTensor())});
        } else if (v.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor &t : v.toTensorVector()) list.push_back(call.back(t));
            v = list;
        }
    }
    if (graph) {
        int count = int(returns);
        recorded[graph].push_back([op, given, made, count]() {
            torch::jit::Stack s = given;
            at::AutoDispatchBelowADInplaceOrView guard;
            op.callBoxed(&s);
            for (auto &[i, target] : made) write_into(target, s[s.size() - count + i].toTensor());
        });
    }
}

void refuse(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *) {
    TORCH_CHECK(false, op.schema().operator_name(), " has kernels for CUDA only: the null device cannot compute it");
}

struct Silent : c10::WarningHandler {
    void process(const c10::Warning &) override {}
};

std::unique_ptr<torch::Library> library;

int install() {
    if (library) return 0;
    Silent silent;
    auto *handler = c10::WarningUtils::get_warning_handler();
    c10::WarningUtils::set_warning_handler(&silent);
    library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    int count = 0;
    for (const auto &name : c10::Dispatcher::singleton().getAllOpNames()) {
        if (name.name.rfind("aten::", 0) != 0) continue;
        auto op = c10::Dispatcher::singleton().findSchema(name);
        if (!op) continue;
        bool is_copy = name.name == "aten::copy_";
        if (!is_copy && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
        if (KEPT.count(name.name)) continue;
        bool is_view = false;
        for (const auto &r : op->schema().returns())
            if (r.alias_info() && !r.alias_info()->isWrite()) is_view = true;
        if (is_view) continue;
        std::string full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
        if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
            !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) &&
            !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
            !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional)) {
            library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
            continue;
        }
        library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
        count++;
    }
    c10::WarningUtils::set_warning_handler(handler);
    nullcuda_on_replay(&replay_all);
    nullcuda_on_destroy(&forget);
    return count;
}

Tensor as_cpu(const Tensor &t) {
    Call call;
    return call.alias(t);
}
Tensor as_cuda(const Tensor &t) {
    Call call;
    call.device = at::Device(at::kCUDA, c10::cuda::current_device());
    return call.back(t);
}

void record(pybind11::object action) {
    void *graph = capture();
    if (!graph) return;
    std::shared_ptr<pybind11::object> kept(new pybind11::object(action), [](pybind11::object *object) {
        pybind11::gil_scoped_acquire gil;
        delete object;
    });
    recorded[graph].push_back([kept]() {
        pybind11::gil_scoped_acquire gil;
        (*kept)();
    });
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("install", &install);
    m.def("as_cpu", &as_cpu);
    m.def("as_cuda", &as_cuda);
    m.def("record", &record);
    m.def("capturing", [] { return capture() != nullptr; });
}
