/*
 * Keeps KVM's code as it is on the virtual host while tests run there: makes two VMs and holds them until it is killed.
 *
 * KVM patches its own code and the scheduler's when the first VM, the last one, or one whose interrupt controller is
 * still off is created or destroyed, and emulated processors sometimes hang on code that changes: the console shows a
 * soft lockup, and the host stops. With these two there are always some. C, static: not every virtual host has Python.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (kvm < 0) {
        perror("/dev/kvm");
        return 1;
    }
    for (int irqchip = 1; irqchip >= 0; irqchip--) {
        int vm = ioctl(kvm, KVM_CREATE_VM, 0);

        if (vm < 0 || (irqchip && ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0) || ioctl(vm, KVM_CREATE_VCPU, 0) < 0) {
            perror("KVM");
            return 1;
        }
    }
    if (daemon(0, 0) < 0) /* reports to the caller that the VMs exist */
        return 1;
    for (;;)
        pause();
}
