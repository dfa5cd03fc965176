# What threads sleep on. Included by the drivers of blocking connections and by _portal.pyx.

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *sem, int shared, unsigned int value)
    int sem_destroy(sem_t *sem)
    int sem_post(sem_t *sem)
    int sem_trywait(sem_t *sem)
    int sem_wait(sem_t *sem)

cdef extern from *:
    """
    #include <semaphore.h>
    #include <time.h>
    static inline int dw_sem_wait(sem_t *sem, double seconds) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
        double until = (double)t.tv_nsec * 1e-9 + seconds;
        t.tv_sec += (time_t)until; t.tv_nsec = (long)((until - (double)(time_t)until) * 1e9);
        return sem_clockwait(sem, CLOCK_MONOTONIC, &t);
    }
    """
    int dw_sem_wait(sem_t *sem, double seconds) nogil
