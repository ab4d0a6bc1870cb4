/* main.h - the main of a test that calls everything: exit code 0, or 1 and the failing line. */
#include "calls.h"
#include <stdio.h>

int main(void) {
    int line = calls();
    if (line) printf("calls.h:%d does not hold\n", line);
    return line ? 1 : 0;
}
