/* executes_init PATH CWD ARGV…: 0 if the agent makes such a program process 1, else 1. */
#include "pid1.h"

int main(int argc, char **argv)
{
    return argc < 4 || !executes_init(argv + 3, *argv[1] ? argv[1] : 0, argv[2]);
}
