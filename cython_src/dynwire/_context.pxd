cdef enum:
    CTX_STOPPED = 1
    CTX_KILLED = 2

cdef class Context:
    cdef double _deadline              # monotonic seconds, or infinity
    cdef int _flags
    cdef object _id                    # str, or None until somebody asks
    cdef bytes _connection_id          # with _seq: what the id is computed from on demand
    cdef unsigned int _seq
    cdef object _headers               # dict, packed bytes, or None
    cdef object _canceller             # callable(kind) that carries stop (1) and kill (2) to the transport, or None
    cdef list _waiters                 # callables, run once when stopped or killed
    cdef public int delivery_count
    cdef object __weakref__

    cdef void set_cancelled(self, int kind)

cdef object current_var
cpdef loop_mark()
cpdef Context current_context()
