// Starts the page once the circuit is unpacked.

import { render } from "preact";
import { App } from "./app";
import { ready } from "./data";
import { printedSvg } from "./exports";
import { setUpKeyboard } from "./keyboard";
import { scene } from "./scene";
import { stage } from "./stage";
import * as state from "./state";

ready.then(() => {
  state.start();
  render(<App />, document.getElementById("app")!);
  setUpKeyboard();
  addEventListener("beforeprint", () => {
    document.getElementById("printed")!.innerHTML = printedSvg(); // every text in it is escaped by the pen
  });
  Object.assign(window, { viewer: { scene, state, stage: () => stage } }); // for tests and the console
  document.documentElement.dataset.ready = "true";
});
