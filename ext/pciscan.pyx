# cython: language_level=3, boundscheck=False, wraparound=False
"""One pass over ``<sysfs>/bus/pci/devices``, without the GIL and without a Python object per file.

System calls are what a scan costs (1 to 4 µs each; a name that does not exist is the most expensive), so it makes few:

- ``uevent`` holds driver, class, vendor, device and subsystem in one file.
- A bridge is never passed through: of it only that, and its IOMMU group, is read.
- A virtual function has the vendor of its physical one and a higher address, so ``physfn`` is read only after a
  function of that vendor that can have virtual ones.
- All endpoints of a bus are on the NUMA node of the bus, so only the first one's is read.
- ``sriov_numvfs`` is never read: the kernel takes the device's lock for it and would make us wait for a driver that
  holds it, and the ``physfn`` links give the number anyway. Nor is ``config``, which wakes a sleeping device.

``look`` reads only what can change: which entries there are and which driver each one has. The
inode number that comes with each entry tells a device that was replaced at the same address.

The readable twin and test oracle is hypeman/_native/pciscan_py.py; both answer alike, byte for byte.
Measured (tests/bench/bench_devices.py, 512 functions in memory, µs of CPU each): scan 17, where
plain Python takes 145, lspci -Dnnk 105 and the twin 38; look 4.
"""

from cpython.exc cimport PyErr_SetFromErrnoWithFilename
from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport EINVAL, ENOENT, errno
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset, strcmp, strlen, strncmp
from posix.fcntl cimport O_CLOEXEC, O_DIRECTORY, O_RDONLY
from posix.types cimport ino_t
from posix.unistd cimport close, read

cdef extern from "<fcntl.h>" nogil:
    int openat(int dirfd, const char *path, int flags)
    int O_PATH

cdef extern from "<unistd.h>" nogil:
    ssize_t readlinkat(int dirfd, const char *path, char *buffer, size_t size)

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        ino_t d_ino
        char d_name[256]
    DIR *opendir(const char *path)
    int dirfd(DIR *directory)
    dirent *readdir(DIR *directory)
    int closedir(DIR *directory)

cdef enum:
    MAX_FILE = 4096
    MAX_NAME = 256
    MAX_RESET = 128
    MAX_ADDRESS = 24
    MAX_VENDORS = 32

cdef struct Function:
    char address[MAX_ADDRESS]
    ino_t inode
    long long vendor
    long long device
    long long class_code
    long long subsystem_vendor
    long long subsystem_device
    long long iommu_group
    long long numa_node
    long long total_vfs
    char driver[MAX_NAME]
    char physfn[MAX_ADDRESS]
    char reset_methods[MAX_RESET]
    bint seen
    bint changed

cdef struct Vendors:
    size_t count  # when full, every vendor counts as being there
    long long ids[MAX_VENDORS]

cdef struct Problem:
    char name[MAX_NAME]
    int error


# Helpers

cdef inline int hex_digit(char c) noexcept nogil:
    if c'0' <= c <= c'9':
        return c - c'0'
    if c'a' <= c <= c'f':
        return c - c'a' + 10
    if c'A' <= c <= c'F':
        return c - c'A' + 10
    return -1


cdef long long parse_hex(const char *text, const char **end) noexcept nogil:
    """Up to eight hex digits, after ``0x`` if that is there; -1 for none."""
    cdef long long value = 0
    cdef int digits = 0
    if text[0] == c'0' and (text[1] == c'x' or text[1] == c'X'):
        text += 2
    while digits < 8 and hex_digit(text[digits]) >= 0:
        value = value * 16 + hex_digit(text[digits])
        digits += 1
    if end != NULL:
        end[0] = text + digits
    return value if digits else -1


cdef long long parse_decimal(const char *text) noexcept nogil:
    """Up to nine digits; -1 for none, which is also what the kernel writes for "no node"."""
    cdef long long value = 0
    cdef int digits = 0
    while digits < 9 and c'0' <= text[digits] <= c'9':
        value = value * 10 + (text[digits] - c'0')
        digits += 1
    return value if digits else -1


cdef bint is_address(const char *name) noexcept nogil:
    """``dddd:bb:dd.f``, with up to eight digits for the domain (VMD makes domains above ffff)."""
    cdef int i = 0
    cdef int k
    while hex_digit(name[i]) >= 0 and i < 9:
        i += 1
    if i < 4 or i > 8:
        return False
    for k in range(2):
        if name[i] != c':' or hex_digit(name[i + 1]) < 0 or hex_digit(name[i + 2]) < 0:
            return False
        i += 3
    return name[i] == c'.' and c'0' <= name[i + 1] <= c'7' and name[i + 2] == 0


cdef int compare(const void *a, const void *b) noexcept nogil:
    cdef char *left = (<Function *>a).address
    cdef char *right = (<Function *>b).address
    cdef size_t left_length = strlen(left)
    cdef size_t right_length = strlen(right)
    if left_length != right_length:
        return -1 if left_length < right_length else 1
    return strcmp(left, right)


cdef void join(char *target, const char *first, const char *second) noexcept nogil:
    """Both strings, concatenated; the caller ensures that there is room."""
    cdef size_t length = strlen(first)
    memcpy(target, first, length)
    memcpy(target + length, second, strlen(second) + 1)


cdef int read_file(int directory, const char *name, char *buffer, int size) noexcept nogil:
    """Fill ``buffer`` with at most ``size - 1`` bytes and a zero; the length, or -1 with errno."""
    cdef int fd = openat(directory, name, O_RDONLY | O_CLOEXEC)
    cdef ssize_t length
    buffer[0] = 0
    if fd < 0:
        return -1
    length = read(fd, buffer, size - 1)
    close(fd)
    if length < 0:
        return -1
    buffer[length] = 0
    return <int>length


cdef long long read_hex(int directory, const char *name) noexcept nogil:
    cdef char buffer[32]
    if read_file(directory, name, buffer, sizeof(buffer)) < 0:
        return -1
    return parse_hex(buffer, NULL)


cdef void read_link_name(int directory, const char *name, char *target, size_t size) noexcept nogil:
    """The last part of what link ``name`` points to; empty if there is none or it does not fit."""
    cdef char buffer[MAX_FILE]
    cdef ssize_t length = readlinkat(directory, name, buffer, MAX_FILE)
    cdef ssize_t start = length
    target[0] = 0
    if length <= 0 or length == MAX_FILE:
        return
    while start > 0 and buffer[start - 1] != c'/':
        start -= 1
    if <size_t>(length - start) >= size:
        return
    memcpy(target, buffer + start, length - start)
    target[length - start] = 0


cdef void copy_line(const char *text, char *target, size_t size) noexcept nogil:
    """The rest of the line; empty if it does not fit."""
    cdef size_t length = 0
    while text[length] and text[length] != c'\n':
        length += 1
    if length >= size:
        length = 0
    memcpy(target, text, length)
    target[length] = 0


cdef void parse_uevent(const char *text, Function *f) noexcept nogil:
    cdef const char *line = text
    cdef const char *end = NULL
    while line[0]:
        if strncmp(line, "PCI_CLASS=", 10) == 0:
            f.class_code = parse_hex(line + 10, NULL)
        elif strncmp(line, "DRIVER=", 7) == 0:
            copy_line(line + 7, f.driver, MAX_NAME)
        elif strncmp(line, "PCI_ID=", 7) == 0:
            f.vendor = parse_hex(line + 7, &end)
            f.device = -1
            if end[0] == c':':
                f.device = parse_hex(end + 1, NULL)
        elif strncmp(line, "PCI_SUBSYS_ID=", 14) == 0:
            f.subsystem_vendor = parse_hex(line + 14, &end)
            f.subsystem_device = -1
            if end[0] == c':':
                f.subsystem_device = parse_hex(end + 1, NULL)
        while line[0] and line[0] != c'\n':
            line += 1
        if line[0]:
            line += 1


cdef inline bint has_vendor(const Vendors *vendors, long long vendor) noexcept nogil:
    cdef size_t i
    for i in range(vendors.count):
        if vendors.ids[i] == vendor:
            return True
    return vendors.count == MAX_VENDORS


cdef inline void add_vendor(Vendors *vendors, long long vendor) noexcept nogil:
    if not has_vendor(vendors, vendor):
        vendors.ids[vendors.count] = vendor
        vendors.count += 1


cdef inline bint is_bridge(const Function *f) noexcept nogil:
    return f.class_code >> 16 == 0x06


cdef inline bint same_bus(const Function *f, const Function *other) noexcept nogil:
    cdef size_t length = strlen(f.address) - 4  # without "dd.f"
    return other != NULL and strncmp(f.address, other.address, length) == 0


cdef int read_function(int top, Function *f, const Function *neighbour, Vendors *physical) noexcept nogil:
    """Fill ``f`` by its address: 0, or an errno.

    ``neighbour`` is the endpoint that was read before it, or NULL; ``physical`` the vendors of which
    there are physical functions so far, NULL if that is not known.
    """
    cdef char buffer[MAX_FILE]
    cdef int length
    cdef int directory = openat(top, f.address, O_PATH | O_DIRECTORY | O_CLOEXEC)
    if directory < 0:
        return errno
    f.vendor = f.device = f.class_code = f.subsystem_vendor = f.subsystem_device = -1
    if read_file(directory, "uevent", buffer, MAX_FILE) > 0:
        parse_uevent(buffer, f)
    if f.vendor < 0 or f.device < 0:
        f.vendor = read_hex(directory, "vendor")
        f.device = read_hex(directory, "device")
        read_link_name(directory, "driver", f.driver, MAX_NAME)
    if f.class_code < 0:
        f.class_code = read_hex(directory, "class")
    if f.subsystem_vendor < 0 or f.subsystem_device < 0:
        f.subsystem_vendor = read_hex(directory, "subsystem_vendor")
        f.subsystem_device = read_hex(directory, "subsystem_device")
    if f.vendor < 0 or f.device < 0 or f.class_code < 0:
        close(directory)
        return ENOENT
    read_link_name(directory, "iommu_group", buffer, MAX_NAME)
    f.iommu_group = parse_decimal(buffer)
    f.numa_node = -1
    f.total_vfs = 0
    if not is_bridge(f):
        if same_bus(f, neighbour):
            f.numa_node = neighbour.numa_node
        elif read_file(directory, "numa_node", buffer, 32) > 0:
            f.numa_node = parse_decimal(buffer)
        if physical == NULL or has_vendor(physical, f.vendor):
            read_link_name(directory, "physfn", f.physfn, MAX_ADDRESS)
            if not is_address(f.physfn):
                f.physfn[0] = 0
        if f.physfn[0] == 0 and read_file(directory, "sriov_totalvfs", buffer, 32) > 0:
            f.total_vfs = max(parse_decimal(buffer), 0)
        read_file(directory, "reset_method", f.reset_methods, MAX_RESET)
        length = <int>strlen(f.reset_methods)
        while length > 0 and f.reset_methods[length - 1] == c'\n':
            length -= 1
            f.reset_methods[length] = 0
    close(directory)
    return 0


cdef object text_of(const char *value):
    return PyUnicode_DecodeUTF8(value, strlen(value), "backslashreplace")


cdef object text_or_none(const char *value):
    return text_of(value) if value[0] else None


cdef tuple row_of(Function *f):
    return (
        text_of(f.address), f.vendor, f.device, f.class_code, f.subsystem_vendor, f.subsystem_device,
        text_or_none(f.driver), f.iommu_group, f.numa_node, text_or_none(f.physfn), f.total_vfs,
        text_of(f.reset_methods),
    )


cdef class Scanner:
    """What a sysfs root holds, as last seen. One thread at a time."""

    cdef bytes _path
    cdef Function *_functions
    cdef size_t _count
    cdef size_t _room
    cdef Problem *_problems
    cdef size_t _problem_count
    cdef size_t _problem_room

    def __init__(self, root):
        self._path = root.encode() + b"/bus/pci/devices"

    def __dealloc__(self):
        PyMem_RawFree(self._functions)
        PyMem_RawFree(self._problems)

    @property
    def problems(self):
        """Entries that were passed over, and why: (name, errno)."""
        cdef size_t i
        return [(text_of(self._problems[i].name), self._problems[i].error) for i in range(self._problem_count)]

    def scan(self):
        """Read everything again: one row per function, in order of address.

        Raises OSError if the directory itself cannot be read.
        """
        cdef const char *path = self._path
        cdef int error
        cdef size_t i
        with nogil:
            error = self._scan(path)
        if error:
            self._fail(error)
        return [row_of(&self._functions[i]) for i in range(self._count)]

    def look(self):
        """What has changed since the last ``scan`` or ``look``.

        Returns ([(address, driver or None)], [addresses gone], [rows new or replaced]).
        """
        cdef const char *path = self._path
        cdef int error
        cdef size_t i
        cdef size_t known
        cdef size_t kept = 0
        cdef list changed = [], gone = [], new = []
        with nogil:
            error = self._look(path, &known)
        if error:
            self._fail(error)
        if known == self._count and not self._any_event():
            return changed, gone, new
        for i in range(self._count):
            if i >= known:
                new.append(row_of(&self._functions[i]))
            elif not self._functions[i].seen:
                gone.append(text_of(self._functions[i].address))
                continue
            elif self._functions[i].changed:
                changed.append((text_of(self._functions[i].address), text_or_none(self._functions[i].driver)))
            self._functions[kept] = self._functions[i]
            kept += 1
        self._count = kept
        qsort(self._functions, self._count, sizeof(Function), compare)
        new.sort(key=lambda row: (len(row[0]), row[0]))
        return changed, gone, new

    cdef int _fail(self, int error) except -1:
        global errno
        if error == -1:
            raise MemoryError
        errno = error
        PyErr_SetFromErrnoWithFilename(OSError, self._path)

    cdef bint _any_event(self) noexcept nogil:
        cdef size_t i
        for i in range(self._count):
            if self._functions[i].changed or not self._functions[i].seen:
                return True
        return False

    cdef int _scan(self, const char *path) noexcept nogil:
        cdef dirent *entry
        cdef DIR *directory = opendir(path)
        cdef Vendors physical
        cdef int error = 0
        physical.count = 0
        if directory == NULL:
            return errno
        self._count = 0
        self._problem_count = 0
        while error == 0:
            entry = readdir(directory)
            if entry == NULL:
                break
            if entry.d_name[0] != c'.':
                error = self._add(entry)
        if error == 0:
            error = self._read_from(dirfd(directory), 0, &physical)
        closedir(directory)
        return error

    cdef int _look(self, const char *path, size_t *known) noexcept nogil:
        cdef dirent *entry
        cdef Function *f
        cdef char driver[MAX_NAME]
        cdef char link[MAX_ADDRESS + 8]
        cdef size_t i
        cdef DIR *directory = opendir(path)
        cdef int top
        cdef int error = 0
        known[0] = self._count
        if directory == NULL:
            return errno
        top = dirfd(directory)
        self._problem_count = 0
        for i in range(self._count):
            self._functions[i].seen = self._functions[i].changed = False
        while error == 0:
            entry = readdir(directory)
            if entry == NULL:
                break
            if entry.d_name[0] == c'.':
                continue
            f = self._find(entry.d_name, known[0])
            if f == NULL or f.inode != entry.d_ino:
                error = self._add(entry)
                continue
            f.seen = True
            join(link, f.address, "/driver")
            read_link_name(top, link, driver, MAX_NAME)
            if strcmp(driver, f.driver) != 0:
                memcpy(f.driver, driver, MAX_NAME)
                f.changed = True
        if error == 0 and self._count > known[0]:
            error = self._read_from(top, known[0], NULL)
        closedir(directory)
        if error:
            self._count = known[0]
        return error

    cdef int _read_from(self, int top, size_t first, Vendors *physical) noexcept nogil:
        """Put the functions from place ``first`` in order, read them, and drop those that cannot be."""
        cdef size_t i
        cdef size_t kept = first
        cdef int error
        cdef Function *neighbour = NULL
        qsort(self._functions + first, self._count - first, sizeof(Function), compare)
        for i in range(first, self._count):
            error = read_function(top, &self._functions[i], neighbour, physical)
            if error:
                if self._problem(self._functions[i].address, error) < 0:
                    return -1
                continue
            if kept != i:
                self._functions[kept] = self._functions[i]
            if not is_bridge(&self._functions[kept]):
                neighbour = &self._functions[kept]
                if physical != NULL and neighbour.total_vfs > 0:
                    add_vendor(physical, neighbour.vendor)
            kept += 1
        self._count = kept
        return 0

    cdef Function *_find(self, const char *address, size_t count) noexcept nogil:
        """Binary search among the first ``count``, which are in order."""
        cdef Function wanted
        cdef size_t low = 0
        cdef size_t high = count
        cdef size_t middle
        cdef int order
        if strlen(address) >= MAX_ADDRESS:
            return NULL
        join(wanted.address, address, "")
        while low < high:
            middle = (low + high) // 2
            order = compare(&wanted, &self._functions[middle])
            if order == 0:
                return &self._functions[middle]
            if order < 0:
                high = middle
            else:
                low = middle + 1
        return NULL

    cdef int _add(self, dirent *entry) noexcept nogil:
        """A place at the end for the entry, to be read later; -1 if there is no memory."""
        cdef Function *f
        cdef size_t room
        cdef void *moved
        if not is_address(entry.d_name):
            return self._problem(entry.d_name, EINVAL)
        if self._count == self._room:
            room = max(<size_t>64, self._room * 2)
            moved = PyMem_RawRealloc(self._functions, room * sizeof(Function))
            if moved == NULL:
                return -1
            self._functions = <Function *>moved
            self._room = room
        f = &self._functions[self._count]
        memset(f, 0, sizeof(Function))
        join(f.address, entry.d_name, "")
        f.inode = entry.d_ino
        f.seen = True
        self._count += 1
        return 0

    cdef int _problem(self, const char *name, int error) noexcept nogil:
        cdef size_t room
        cdef void *moved
        if self._problem_count == self._problem_room:
            room = max(<size_t>16, self._problem_room * 2)
            moved = PyMem_RawRealloc(self._problems, room * sizeof(Problem))
            if moved == NULL:
                return -1
            self._problems = <Problem *>moved
            self._problem_room = room
        join(self._problems[self._problem_count].name, name, "")
        self._problems[self._problem_count].error = error
        self._problem_count += 1
        return 0
