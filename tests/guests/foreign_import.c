// Needs a function that no WASI host offers.
__attribute__((import_module("env"), import_name("launch"))) int launch(int);
int main(void) { return launch(1); }
