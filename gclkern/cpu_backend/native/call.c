/* The usual call of gclkern.functional.gcl_cross_entropy, from Python's arguments to its results.
 *
 * A check in Python looks at one argument at a time, to name it in an error, and for a small batch all checks take longer than the loss. So a call whose
 * arguments are ready is recognised here: no check of gclkern.validation would refuse them, and the loops take them without a conversion. All other calls go
 * through the checks. Nothing about an argument is remembered between calls.
 *
 * Tensors are read by the interface that torch offers to other libraries (DLPack's exchange interface). Of Python only the limited API is used, so one library
 * serves every Python from 3.11 on; without Python's headers, and for a free-threaded Python, the library has the loops alone.
 */
#ifdef __has_include
#if __has_include(<Python.h>)
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#endif
#endif
#endif

#ifdef Py_LIMITED_API
#include <float.h>
#include <stdlib.h>

#include "native.h"

int64_t gclkern_logit_loss(const struct logits *given);

/* ---- DLPack 1 */

struct dl_tensor {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
enum { ON_CPU = 1 };
enum { INT = 0, FLOAT = 2, BFLOAT = 4 }; /* codes */

struct exchange {
    uint32_t major, minor;
    const struct exchange *previous;
    void *allocate, *from_python, *to_python;
    int (*read)(void *value, struct dl_tensor *tensor); /* 0, or an error of Python */
};

/* ---- what `connect` is given, and names */

struct state {
    PyObject *torch, *plain, *dispatch_keys, *ordinary_keys, *stack_depth, *transforms_are_active, *grad_is_enabled, *num_threads, *find_seed, *cpu, *scalar,
        *float_options, *saved_tensors_are_freed, *draw, *bounds;
    PyObject *raw_repr, *requires_grad, *empty_like;
    const int64_t *drawn; /* where `draw` puts a seed */
    const struct exchange *exchange;
};

/* Whether the object is the one, which the caller gives away. An error of Python, where there is no object, is left for the end of the call. */
static int is_the(PyObject *expected, PyObject *object) {
    Py_XDECREF(object);
    return object == expected;
}

/* The int that a function returns, or -1. */
static int64_t int_of(PyObject *function) {
    PyObject *found = PyObject_CallNoArgs(function);
    int64_t number = found == NULL ? -1 : PyLong_AsLongLong(found);
    Py_XDECREF(found);
    return number;
}

/* As gclkern.devices.is_ordinary; its elements are then in memory as `tensor` says. */
static int read_tensor(const struct state *state, PyObject *value, struct dl_tensor *tensor) {
    if (PySequence_Contains(state->plain, (PyObject *)Py_TYPE(value)) != 1) return 0;
    PyObject *keys = PyObject_CallFunctionObjArgs(state->dispatch_keys, value, NULL);
    PyObject *bits = keys == NULL ? NULL : PyObject_CallMethodObjArgs(keys, state->raw_repr, NULL);
    int ordinary = bits != NULL && PySet_Contains(state->ordinary_keys, bits) == 1;
    Py_XDECREF(keys);
    Py_XDECREF(bits);
    if (!ordinary || state->exchange->read(value, tensor) != 0 || tensor->strides == NULL || tensor->device_type != ON_CPU) return 0;
    tensor->data = (char *)tensor->data + tensor->byte_offset;
    return 1;
}

static int has_type(const struct dl_tensor *tensor, int code, int bits) { return tensor->code == code && tensor->bits == bits && tensor->lanes == 1; }

static int is_vector(const struct dl_tensor *tensor, int64_t length) {
    return tensor->ndim == 1 && tensor->shape[0] == length && (length == 1 || tensor->strides[0] == 1);
}

static int is_switch(PyObject *value) { return value == Py_True || value == Py_False; }

static int is_text(PyObject *value, const char *text) { return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0; }

static int is_number(PyObject *value, double low, double high, double *number) {
    if (is_switch(value) || !(PyFloat_Check(value) || PyLong_Check(value))) return 0;
    *number = PyFloat_AsDouble(value);
    return *number >= low && *number <= high && PyErr_Occurred() == NULL;
}

static int is_int(PyObject *value, int64_t low, int64_t high, int64_t *number) {
    if (is_switch(value) || !PyLong_Check(value)) return 0;
    *number = PyLong_AsLongLong(value);
    return *number >= low && *number <= high && PyErr_Occurred() == NULL;
}

static int requires_grad(const struct state *state, PyObject *tensor) { return is_the(Py_True, PyObject_GetAttr(tensor, state->requires_grad)); }

/* None, for which `vector` stays as it is, or one float32 for each class; `differentiable` ones may require a gradient. */
static int is_class_vector(const struct state *state, PyObject *value, int64_t classes, int differentiable, const float **vector) {
    struct dl_tensor tensor;
    if (value == Py_None) return 1;
    if (!read_tensor(state, value, &tensor) || !has_type(&tensor, FLOAT, 32) || !is_vector(&tensor, classes)) return 0;
    *vector = tensor.data;
    return differentiable || !requires_grad(state, value);
}

/* Whether a tracer, a mode or a transform of torch follows the operators that are called. gclkern.functional asks for torch.compile. */
static int is_followed(const struct state *state) {
    return int_of(state->stack_depth) != 0 || !is_the(Py_False, PyObject_CallNoArgs(state->transforms_are_active));
}

/* ---- the arguments of gcl_cross_entropy, in the order in which `logit_loss` takes them */

enum {
    GIVEN_COSINE, GIVEN_TARGET, GIVEN_CLOUD, GIVEN_MARGIN, GIVEN_BIAS, GIVEN_WEIGHT, GIVEN_TARGET_B, GIVEN_LAM, GIVEN_LABEL_SMOOTHING, GIVEN_SEED,
    GIVEN_SCALE, GIVEN_GAMMA, GIVEN_FOCAL_DETACH, GIVEN_IGNORE_INDEX, GIVEN_REDUCTION, GIVEN_ROW_OFFSET, GIVEN_CLASS_OFFSET, GIVEN_ANGULAR,
    GIVEN_DIFFICULTY_MARGIN, GIVEN_EASY_MARGIN, GIVEN_BACKEND, ARGUMENTS
};

/* The cosines and labels. */
static int are_rows(const struct state *state, PyObject *const *values, struct logits *call) {
    struct dl_tensor cosine, target;
    if (!read_tensor(state, values[GIVEN_COSINE], &cosine) || !read_tensor(state, values[GIVEN_TARGET], &target)) return 0;
    if (cosine.ndim != 2 || cosine.shape[0] == 0 || cosine.shape[1] == 0) return 0;
    if (!has_type(&target, INT, 64) || !is_vector(&target, cosine.shape[0])) return 0;
    if (has_type(&cosine, FLOAT, 32)) {
        call->dtype = FLOAT32;
    } else if (has_type(&cosine, BFLOAT, 16)) {
        call->dtype = BFLOAT16;
    } else if (has_type(&cosine, FLOAT, 16)) {
        call->dtype = FLOAT16;
    } else {
        return 0;
    }
    call->terms.num_rows = cosine.shape[0];
    call->terms.num_classes = call->num_columns = cosine.shape[1];
    call->terms.target = target.data;
    call->matrix = cosine.data;
    call->row_stride = cosine.strides[0];
    call->class_stride = cosine.strides[1];
    return 1;
}

static int are_options(PyObject *const *values, struct terms *terms) {
    if (values[GIVEN_TARGET_B] != Py_None || values[GIVEN_LAM] != Py_None) return 0;
    if (values[GIVEN_ANGULAR] != Py_False || values[GIVEN_DIFFICULTY_MARGIN] != Py_False || values[GIVEN_EASY_MARGIN] != Py_False) return 0;
    if (!is_switch(values[GIVEN_FOCAL_DETACH]) || !(is_text(values[GIVEN_BACKEND], "auto") || is_text(values[GIVEN_BACKEND], "cpu"))) return 0;
    terms->focal_detach = values[GIVEN_FOCAL_DETACH] == Py_True;
    terms->reduction = is_text(values[GIVEN_REDUCTION], "mean") ? MEAN : is_text(values[GIVEN_REDUCTION], "sum") ? SUM : NONE;
    if (terms->reduction == NONE && !is_text(values[GIVEN_REDUCTION], "none")) return 0;
    return is_number(values[GIVEN_SCALE], 0.0, DBL_MAX, &terms->scale) && terms->scale > 0.0 &&
           is_number(values[GIVEN_GAMMA], 0.0, DBL_MAX, &terms->gamma) && is_number(values[GIVEN_LABEL_SMOOTHING], 0.0, 1.0, &terms->label_smoothing) &&
           is_int(values[GIVEN_IGNORE_INDEX], INT64_MIN, INT64_MAX, &terms->ignore_index) &&
           is_int(values[GIVEN_ROW_OFFSET], 0, INT64_MAX - terms->num_rows + 1, &terms->row_offset) &&
           is_int(values[GIVEN_CLASS_OFFSET], 0, ((int64_t)1 << 35) - terms->num_classes, &terms->class_offset);
}

/* One margin for all classes; `vector`, which the caller frees, holds it. */
static int is_margin(const struct state *state, PyObject *value, struct terms *terms, float **vector) {
    double number;
    if (!is_number(value, -FLT_MAX, FLT_MAX, &number)) return is_class_vector(state, value, terms->num_classes, 0, &terms->margin);
    if (number == 0.0) return 1;
    *vector = malloc((size_t)terms->num_classes * sizeof **vector);
    for (int64_t k = 0; *vector != NULL && k < terms->num_classes; k++) (*vector)[k] = (float)number;
    terms->margin = *vector;
    return *vector != NULL;
}

static int are_ready(const struct state *state, PyObject *const *values, struct logits *call, float **margins) {
    struct terms *terms = &call->terms;
    return !is_followed(state) && are_rows(state, values, call) && are_options(values, terms) &&
           is_class_vector(state, values[GIVEN_CLOUD], terms->num_classes, 0, &terms->cloud) &&
           is_class_vector(state, values[GIVEN_BIAS], terms->num_classes, 1, &terms->bias) &&
           is_class_vector(state, values[GIVEN_WEIGHT], terms->num_classes, 0, &terms->weight) && is_margin(state, values[GIVEN_MARGIN], terms, margins);
}

/* A new tensor of the shape of `like`, with the options of empty_like, if any; NULL with an error of Python. */
static PyObject *new_tensor(const struct state *state, PyObject *like, PyObject *options, float **data) {
    struct dl_tensor tensor;
    PyObject *function = PyObject_GetAttr(state->torch, state->empty_like), *arguments = PyTuple_Pack(1, like);
    PyObject *made = function == NULL || arguments == NULL ? NULL : PyObject_Call(function, arguments, options);
    Py_XDECREF(function);
    Py_XDECREF(arguments);
    if (made != NULL && state->exchange->read(made, &tensor) == 0) {
        *data = (float *)((char *)tensor.data + tensor.byte_offset);
        return made;
    }
    Py_XDECREF(made);
    return NULL;
}

/* The seed that the argument gives, or one from torch's generator; 0 with an error of Python, or if it is not a tensor in memory. To draw one costs the time
 * of an operator of torch: it goes to a tensor made once, unless another thread is about to take its seed from there. */
static int find_seed(const struct state *state, PyObject *given, int64_t *seed) {
    static int in_use; /* changed by the thread that holds Python's lock, which torch may release while it draws */
    struct dl_tensor tensor;
    int found;
    PyObject *owner;
    if (given == Py_None && !in_use) {
        in_use = 1;
        owner = PyObject_Call(state->draw, state->bounds, NULL);
        found = owner != NULL;
        *seed = *state->drawn;
        in_use = 0;
    } else {
        owner = PyObject_CallFunctionObjArgs(state->find_seed, given, state->cpu, NULL);
        found = owner != NULL && read_tensor(state, owner, &tensor);
        if (found) *seed = *(const int64_t *)tensor.data;
    }
    Py_XDECREF(owner);
    return found;
}

/* The loss, and the gradient of the cosines for an upstream gradient of 1, or None where there will be no backward. NULL if values are wrong,
 * or with an error of Python. */
static PyObject *computed(const struct state *state, PyObject *const *values, struct logits *call) {
    int64_t seed;
    PyObject *loss = NULL, *gradient = Py_None, *result = NULL;
    call->threads = int_of(state->num_threads);
    if (call->terms.cloud != NULL) {
        if (!find_seed(state, values[GIVEN_SEED], &seed)) goto end;
        call->terms.seed = &seed;
    }
    if (is_the(Py_True, PyObject_CallNoArgs(state->grad_is_enabled)) &&
        (requires_grad(state, values[GIVEN_COSINE]) || (call->terms.bias != NULL && requires_grad(state, values[GIVEN_BIAS])))) {
        int alike = call->dtype == FLOAT32 && call->class_stride == 1 && call->row_stride == call->num_columns; /* torch reads no options in less time */
        gradient = new_tensor(state, values[GIVEN_COSINE], alike ? NULL : state->float_options, &call->gradient);
        call->kept = call->gradient;
    }
    int each = call->terms.reduction == NONE;
    loss = new_tensor(state, each ? values[GIVEN_TARGET] : state->scalar, each ? state->float_options : NULL, &call->loss);
    if (loss == NULL || gradient == NULL) goto end;
    int64_t done;
    Py_BEGIN_ALLOW_THREADS
    done = gclkern_logit_loss(call);
    Py_END_ALLOW_THREADS
    if (done == DONE) result = PyTuple_Pack(2, loss, gradient);
end:
    if (gradient != Py_None) Py_XDECREF(gradient);
    Py_XDECREF(loss);
    return result;
}

/* None for a call that is not ready: the checks then find the same error, and name it. An interrupt is passed on. */
static PyObject *not_ready(void) {
    if (PyErr_Occurred() != NULL) {
        if (!PyErr_ExceptionMatches(PyExc_Exception)) return NULL;
        PyErr_Clear();
    }
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *logit_loss(PyObject *module, PyObject *const *values, Py_ssize_t count) {
    const struct state *state = PyModule_GetState(module);
    struct logits call = {0};
    float *margins = NULL;
    PyObject *result = count == ARGUMENTS && are_ready(state, values, &call, &margins) ? computed(state, values, &call) : NULL;
    free(margins);
    return result == NULL ? not_ready() : result;
}

/* Whether a backward is the usual one of a training loop: the last of its graph, without a second derivative, for an ordinary upstream gradient of 1. */
static PyObject *is_usual_backward(PyObject *module, PyObject *value) {
    const struct state *state = PyModule_GetState(module);
    struct dl_tensor tensor;
    int usual = is_the(Py_False, PyObject_CallNoArgs(state->grad_is_enabled)) && read_tensor(state, value, &tensor) &&
                tensor.ndim == 0 && has_type(&tensor, FLOAT, 32) && *(float *)tensor.data == 1.0f &&
                is_the(Py_True, PyObject_CallNoArgs(state->saved_tensors_are_freed));
    PyObject *result = not_ready();
    if (result == NULL) return NULL;
    Py_DECREF(result);
    return PyBool_FromLong(usual);
}

/* ---- the module */

static PyObject *connect(PyObject *module, PyObject *arguments) {
    struct state *state = PyModule_GetState(module), given = {0};
    struct dl_tensor seed;
    PyObject *capsule, *scratch;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOOOOOOO", &given.torch, &capsule, &given.plain, &given.dispatch_keys, &given.ordinary_keys, &given.stack_depth,
                          &given.transforms_are_active, &given.grad_is_enabled, &given.num_threads, &given.find_seed, &given.cpu, &given.scalar,
                          &given.float_options, &given.saved_tensors_are_freed, &scratch, &given.draw, &given.bounds)) {
        return NULL;
    }
    given.raw_repr = PyUnicode_InternFromString("raw_repr");
    given.requires_grad = PyUnicode_InternFromString("requires_grad");
    given.empty_like = PyUnicode_InternFromString("empty_like");
    if (given.raw_repr == NULL || given.requires_grad == NULL || given.empty_like == NULL) return NULL;
    given.exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (given.exchange == NULL) return NULL;
    while (given.exchange != NULL && given.exchange->major > 1) given.exchange = given.exchange->previous;
    if (given.exchange == NULL || given.exchange->major != 1 || given.exchange->read == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "torch has another version of DLPack's exchange interface");
        return NULL;
    }
    if (given.exchange->read(scratch, &seed) != 0) return NULL;
    given.drawn = (const int64_t *)((char *)seed.data + seed.byte_offset);
    *state = given;
    Py_INCREF(arguments); /* for as long as the process runs, and with it the objects in it */
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, NULL},
    {"logit_loss", (PyCFunction)(void (*)(void))logit_loss, METH_FASTCALL, NULL},
    {"is_usual_backward", is_usual_backward, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, sizeof(struct state), methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
#endif
