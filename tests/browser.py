"""Headless Chromium, driven through its DevTools protocol over two pipes: it needs no driver and no package."""

import base64
import json
import os
import select
import shutil
import signal
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
_FLAGS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync'),
    *('--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage'),
    *('--hide-scrollbars', '--remote-debugging-pipe'),
)


class Browser:
    """One page of a browser with a fresh profile; `errors` lists the errors and warnings of its console."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp(prefix='cfg_jax_chromium_')
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        silent = os.open(os.devnull, os.O_RDWR)
        # The browser reads commands from descriptor 3 and answers on 4: its ends are first moved above those numbers.
        child_ends = [os.dup(end) for end in (commands, answers, silent)]
        while min(child_ends) < 5:
            child_ends = [os.dup(end) for end in child_ends]
        moves = [(os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(child_ends, (3, 4, 1))]
        moves.append((os.POSIX_SPAWN_DUP2, child_ends[2], 2))
        arguments = [PROGRAM, *_FLAGS, f'--user-data-dir={self._profile}', 'about:blank']
        self._process = os.posix_spawn(PROGRAM, arguments, os.environ, file_actions=moves, setpgroup=0)
        for end in (commands, answers, silent, *child_ends):
            os.close(end)
        self._rest, self._count, self._session, self.errors = b'', 0, None, []
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self._session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.send(f'{domain}.enable')
        return self

    def __exit__(self, *_):
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read), os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, **parameters):
        """Send a command and return its answer; keep what the console says meanwhile."""
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': parameters}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._count:
                assert 'error' not in answer, (method, answer)
                return answer['result']

    def _next(self, seconds=60):
        """Return the next message of the browser."""
        deadline = time.monotonic() + seconds
        while b'\0' not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            received = os.read(self._read, 1 << 20) if ready else b''
            assert received, 'Chromium has ended' if ready else f'Chromium has been silent for {seconds} s'
            self._rest += received
        first, self._rest = self._rest.split(b'\0', 1)
        message = json.loads(first)
        kind, values = message.get('method'), message.get('params', {})
        if kind == 'Runtime.exceptionThrown':
            self.errors.append(values['exceptionDetails'])
        elif kind == 'Runtime.consoleAPICalled' and values['type'] in ('error', 'warning', 'assert'):
            self.errors.append(values['args'])
        elif kind == 'Log.entryAdded' and values['entry']['level'] in ('error', 'warning'):
            self.errors.append(values['entry'])
        return message

    def open(self, path, *, width, height=900, scheme='light'):
        """Open a file in a window of this size and colour scheme."""
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
        self.send('Page.navigate', url=path.resolve().as_uri())
        while self.evaluate('location.href') == 'about:blank' or self.evaluate('document.readyState') != 'complete':
            time.sleep(0.02)

    def evaluate(self, expression):
        """Return the value of a JavaScript expression, awaited."""
        answer = self.send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def point_at(self, selector, *, click=False, shift=False):
        """Scroll an element into view, move the mouse onto its middle and, if asked, click; 2 is a double click."""
        x, y = self.evaluate(
            f'(() => {{ const e = document.querySelector({json.dumps(selector)});'
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            'return [b.x + b.width / 2, b.y + b.height / 2] })()'
        )
        self.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
        self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
        for number in range(1, click + 1):
            for kind in ('mousePressed', 'mouseReleased'):
                button = {'button': 'left', 'clickCount': number, 'modifiers': 8 * shift}
                self.send('Input.dispatchMouseEvent', type=kind, x=x, y=y, **button)

    def press(self, key, *, shift=False):
        text = {'text': '\r', 'windowsVirtualKeyCode': 13} if key == 'Enter' else {}
        for kind in ('keyDown', 'keyUp'):
            self.send('Input.dispatchKeyEvent', type=kind, key=key, code=key, modifiers=8 * shift, **text)

    def screenshot(self, path, *, whole=True):
        """Write a PNG of the whole page, or of what the window shows."""
        extra = {}
        if whole:
            width, height = self.evaluate('[innerWidth, document.documentElement.scrollHeight]')
            extra = {'clip': {'x': 0, 'y': 0, 'width': width, 'height': height, 'scale': 1}}
        answer = self.send('Page.captureScreenshot', captureBeyondViewport=whole, **extra)
        path.write_bytes(base64.b64decode(answer['data']))
