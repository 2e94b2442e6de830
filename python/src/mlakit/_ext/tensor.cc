// Python objects as borrowed mla_tensors: DLPack's C exchange API, the buffer protocol, ml_dtypes, __dlpack__.
#include "tensor.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace mlakit_py {

// DLPack 1.x structures, by its published layout. mla_tensor is DLTensor.
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  mla_tensor tensor;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  int (*allocate)(mla_tensor* prototype, ManagedVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, mla_tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

namespace {

constexpr uint32_t kDlpackMajor = 1;
constexpr uint64_t kIsReadOnly = 1, kIsCopied = 2;

struct Managed {
  mla_tensor tensor;
  void* context;
  void (*deleter)(Managed*);

  static constexpr uint32_t major = kDlpackMajor;
  static constexpr uint64_t flags = 0;
};

// The type of a one-letter buffer format; code 255, which nobody knows, if it is no number.
mla_data_type type_of_format(const char* format, Py_ssize_t itemsize) {
  const char* letter = format == nullptr ? "B" : format;
  if (std::strchr("@=<", *letter)) ++letter;  // native or little endian, which is the same here
  uint8_t code = 255;
  if (letter[0] != '\0' && letter[1] == '\0') {
    if (std::strchr("bhilqn", *letter)) code = 0;
    if (std::strchr("BHILQN", *letter)) code = 1;
    if (std::strchr("efd", *letter)) code = 2;
    if (*letter == '?') code = 6;
  }
  return {code, static_cast<uint8_t>(8 * itemsize), 1};
}

// DLPack's code for the name of an ml_dtypes type; -1 for any other.
int code_of_ml_dtype(const char* name) {
  if (std::strcmp(name, "bfloat16") == 0) return 4;
  if (std::strcmp(name, "float8_e4m3fn") == 0) return 10;
  return -1;
}

// What a tensor type offers under DLPack's name for it; nullptr if nothing that we understand.
const ExchangeApi* exchange_api_of(nb::handle type) {
  nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->major > kDlpackMajor) api = api->previous;
  const bool is_usable = api != nullptr && api->major == kDlpackMajor && api->tensor_from_object != nullptr;
  return is_usable ? api : nullptr;
}

}  // namespace

int32_t dtype_of(mla_data_type type) {
  if (type.lanes != 1) return MLA_DTYPE_DEFAULT;
  if (type.code == 4 && type.bits == 16) return MLA_DTYPE_BF16;
  if (type.code == 2 && type.bits == 16) return MLA_DTYPE_FP16;
  if (type.code == 2 && type.bits == 32) return MLA_DTYPE_FP32;
  if (type.code == 10 && type.bits == 8) return MLA_DTYPE_E4M3;
  if (type.code == 0 && type.bits == 32) return MLA_DTYPE_INT32;
  return MLA_DTYPE_DEFAULT;
}

Buffer::Buffer(size_t nbytes_, size_t alignment_)
    : nbytes(nbytes_),
      alignment(std::max<size_t>(alignment_, 64)),
      data(::operator new(std::max<size_t>(nbytes_, 1), std::align_val_t{alignment})) {}
Buffer::~Buffer() { ::operator delete(data, std::align_val_t{alignment}); }

Tensor::Tensor(nb::handle object, const char* name, bool is_written, void* stream)
    : name_(name), is_written_(is_written) {
  if (object.is_none()) {
    is_none_ = true;
  } else if (!from_exchange_api(object) && !from_buffer(object) && !from_ml_dtypes(object) &&
             !from_dlpack(object, stream)) {
    PyErr_Format(PyExc_TypeError,
                 "%s: expected a tensor (torch, numpy, ml_dtypes, cupy, jax or another with DLPack), got %R", name,
                 reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    throw nb::python_error();
  }
}

Tensor::~Tensor() {
  if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
}

void Tensor::refuse(const char* reason) const {
  PyErr_Format(PyExc_ValueError, "%s: %s", name_, reason);
  throw nb::python_error();
}

void Tensor::own_shape() {
  if (is_none_ || tensor_.ndim > kMaxDims) return;  // the library refuses so many dimensions at every call
  for (int d = 0; d < tensor_.ndim; ++d) {
    shape_[d] = tensor_.shape[d];
    if (tensor_.strides != nullptr) strides_[d] = tensor_.strides[d];
  }
  tensor_.shape = shape_;
  if (tensor_.strides != nullptr) tensor_.strides = strides_;
}

void* Tensor::current_stream() const {
  void* stream = nullptr;
  if (api_ == nullptr || api_->current_stream == nullptr || tensor_.device.device_type != MLA_DEVICE_CUDA)
    return stream;
  if (api_->current_stream(tensor_.device.device_type, tensor_.device.device_id, &stream) != 0)
    throw nb::python_error();
  return stream;
}

FrameworkMemory::FrameworkMemory(const Tensor& like, uint64_t nbytes) {
  if (like.api_ == nullptr || like.api_->allocate == nullptr) return;
  int64_t shape = static_cast<int64_t>(nbytes + kAlignment - 1);
  mla_tensor prototype{};
  prototype.device = like.tensor_.device;
  prototype.ndim = 1;
  prototype.dtype = {1, 8, 1};  // bytes
  prototype.shape = &shape;
  // What went wrong is not kept: the caller asks the framework again, by a way that raises its own exceptions.
  const auto ignore = [](void*, const char*, const char*) {};
  if (like.api_->allocate(&prototype, &managed_, nullptr, ignore) != 0) managed_ = nullptr;
}

FrameworkMemory::~FrameworkMemory() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

void* FrameworkMemory::data() const {
  if (managed_ == nullptr) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(managed_->tensor.data) + managed_->tensor.byte_offset;
  return reinterpret_cast<void*>((begin + kAlignment - 1) / kAlignment * kAlignment);
}

bool Tensor::from_exchange_api(nb::handle object) {
  // Call after call brings the same type: remember the last one. The reference keeps its address from being reused.
  static PyObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type != last_type) {
    const ExchangeApi* api = exchange_api_of(type);
    Py_INCREF(type);
    Py_XDECREF(last_type);
    last_type = type;
    last_api = api;
  }
  if (last_api == nullptr) return false;
  if (last_api->tensor_from_object(object.ptr(), &tensor_) != 0) throw nb::python_error();
  api_ = last_api;
  return true;
}

bool Tensor::from_buffer(nb::handle object) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();  // an element type or device that the protocol cannot name: the next way may
    return false;
  }
  if (is_written_ && buffer_.readonly) refuse("is written to, so it must not be read-only");
  if (buffer_.ndim > kMaxDims) refuse("has more than 8 dimensions");
  tensor_.data = buffer_.buf;
  tensor_.device = {MLA_DEVICE_CPU, 0};
  tensor_.ndim = buffer_.ndim;
  tensor_.dtype = type_of_format(buffer_.format, buffer_.itemsize);
  for (int d = 0; d < buffer_.ndim; ++d) {
    if (buffer_.strides[d] % buffer_.itemsize != 0) refuse("strides must be whole elements");
    shape_[d] = buffer_.shape[d];
    strides_[d] = buffer_.strides[d] / buffer_.itemsize;
  }
  tensor_.shape = shape_;
  tensor_.strides = strides_;
  return true;
}

bool Tensor::from_ml_dtypes(nb::handle object) {
  nb::object numpy =
      nb::steal(PySys_GetObject("modules") ? PyMapping_GetItemString(PySys_GetObject("modules"), "numpy") : nullptr);
  if (!numpy.is_valid()) {
    PyErr_Clear();
    return false;
  }
  if (!nb::isinstance(object, numpy.attr("ndarray"))) return false;
  const int code = code_of_ml_dtype(nb::str(object.attr("dtype").attr("name")).c_str());
  if (code < 0) return false;
  nb::object bits = object.attr("view")(nb::int_(object.attr("itemsize")).equal(nb::int_(2)) ? "uint16" : "uint8");
  if (!from_buffer(bits)) return false;
  tensor_.dtype.code = static_cast<uint8_t>(code);
  return true;
}

template <class ManagedTensor>
bool Tensor::from_capsule(const char* capsule_name) {
  if (!PyCapsule_IsValid(capsule_.ptr(), capsule_name)) return false;
  auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), capsule_name));
  // The capsule keeps its name, so its own destructor frees the tensor, whatever version it is of.
  if (managed->major != kDlpackMajor) refuse("comes with another major version of DLPack than 1");
  if (managed->flags & kIsCopied) refuse("can be exported as a copy only, and nothing is copied silently");
  if (is_written_ && (managed->flags & kIsReadOnly)) refuse("is written to, so it must not be read-only");
  tensor_ = managed->tensor;
  return true;
}

bool Tensor::from_dlpack(nb::handle object, void* stream) {
  if (!nb::hasattr(object, "__dlpack__") || !nb::hasattr(object, "__dlpack_device__")) return false;
  nb::object export_tensor = object.attr("__dlpack__");
  nb::dict options;
  if (nb::cast<int32_t>(object.attr("__dlpack_device__")()[0]) == MLA_DEVICE_CUDA) {
    const auto handle = reinterpret_cast<uintptr_t>(stream);
    options["stream"] = handle == 0 ? 1 : handle;  // DLPack's number for the default stream is 1
  }
  options["max_version"] = nb::make_tuple(kDlpackMajor, 0);
  try {
    capsule_ = export_tensor(**options);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    PyDict_DelItemString(options.ptr(), "max_version");  // a producer older than DLPack 1
    capsule_ = export_tensor(**options);
  }
  return from_capsule<ManagedVersioned>("dltensor_versioned") || from_capsule<Managed>("dltensor");
}

Memory memory_of(nb::handle object, const char* name, bool is_written, void* stream) {
  if (nb::isinstance<Buffer>(object)) {
    Buffer* buffer = nb::inst_ptr<Buffer>(object);
    return {buffer->data, buffer->nbytes};
  }
  Tensor holder(object, name, is_written, stream);
  if (holder.get() == nullptr) return {nullptr, 0};
  const mla_tensor& tensor = *holder.get();
  uint64_t bytes = (tensor.dtype.bits * tensor.dtype.lanes + 7) / 8;
  for (int d = 0; d < tensor.ndim; ++d) bytes *= static_cast<uint64_t>(tensor.shape[d]);
  return {static_cast<char*>(tensor.data) + tensor.byte_offset, bytes};
}

}  // namespace mlakit_py
