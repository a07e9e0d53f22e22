import json, hashlib
import numpy as np, pytest, av
from dit_accel.video import read_video
import dit_accel.video as V
from dit_accel.cli import main
def planes(p):
    with av.open(str(p)) as c: return [hashlib.md5(f.to_ndarray().tobytes()).hexdigest()[:6] for f in c.decode(video=0)]
def packets(p):
    with av.open(str(p)) as c: return [hashlib.md5(bytes(k)).hexdigest()[:6] for k in c.demux(video=0)]
@pytest.mark.parametrize("n", range(30))
def test_rep(n, tiny_wan_folder, tmp_path, monkeypatch):
    seen=[];yuv=[]
    o420=V.rgb_to_yuv420
    def c(rgb):
        y=o420(rgb); yuv.append(hashlib.md5(y.tobytes()).hexdigest()[:6]); return y
    monkeypatch.setattr(V,"rgb_to_yuv420",c)
    out=[]
    def r(*w):
        yuv.clear()
        assert main(["render","a red circle moving left on a black background","-o",str(tmp_path/"out.mp4"),"--model",str(tiny_wan_folder),"--steps","2","--frames","9","--height","32","--width","32","--force",*w])==0
        p=tmp_path/"out.mp4"
        out.append((list(yuv),packets(p),planes(p),[hashlib.md5(read_video(p)[0].tobytes()).hexdigest()[:6] for _ in range(4)]))
    r(); seed=json.loads((tmp_path/"out.json").read_text())["seed"]
    r("--seed",str(seed))
    for name,a,b in zip(("yuv","packets","planes","read"),*out):
        if a!=b: print("DIFF",name,a,b)
    assert out[0]==out[1]
